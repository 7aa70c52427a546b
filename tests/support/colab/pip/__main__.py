import json
import os
import sys

with open(os.environ["PIP_LOG"], "a") as log:
    log.write(json.dumps({"arguments": sys.argv[1:], "constraints": sys.stdin.read().split()}) + "\n")
sys.exit(int(os.environ.get("PIP_EXIT", "0")))
