"""Google's object storage on loopback: the part of its JSON interface that gcsfs uses to list, upload, fetch, delete.

    with connected_store(monkeypatch) as store:
        ObjectPlace("gs://bucket/folder")
        store.faults.append(Fault("POST", "/upload/", status=503, times=2))

`objects` has what lies in each bucket. Faults and the lists of requests are those of the Hub in hub.py. A flipped bit
of an upload is stored; one of a download is sent. For a process of its own, store.environment() is all it needs.
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import re
import types

from hub import Hub, _Handler, _Refusal

# Its other client asks Google itself, past loopback, what kind of bucket this is.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

PAGE = 3  # entries of one answer: a list takes several


class Store(Hub):
    """The server. token: what a request has to carry, None for anyone; buckets: names of those that exist."""

    def __init__(self, *buckets, token=None):
        super().__init__()
        self.objects = {bucket: {} for bucket in buckets or ("bucket",)}
        self.sessions = {}  # of resumable uploads: [bucket, name, bytes so far]
        self.token, self.refused = token, set()  # refused: methods that the account may not use

    def environment(self):
        """What to set for a client's process."""
        return {"STORAGE_EMULATOR_HOST": self.url, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}

    def names(self, start=""):
        """The names of the objects of all buckets, after `start`, which they begin with."""
        found = [f"{bucket}/{name}" for bucket, objects in self.objects.items() for name in objects]
        return sorted(name.removeprefix(start) for name in found if name.startswith(start))


@contextlib.contextmanager
def connected_store(monkeypatch, *buckets, **options):
    """A Store that this process's gcsfs talks to; store.slept has the pauses that the client wanted, in seconds."""
    import gcsfs.retry

    async def sleep(seconds):
        store.slept.append(seconds)
        await asyncio.sleep(0)

    with Store(*buckets, **options) as store:
        store.slept = []
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=sleep))
        yield store
    assert not store.unknown


class _StoreHandler(_Handler):
    bucket_path, object_path = r"/storage/v1/b/(?P<bucket>[^/]+)", r"/o/(?P<name>.+)"
    routes = [
        ("GET", bucket_path, "bucket"),
        ("GET", bucket_path + "/o", "list_objects"),
        ("GET", bucket_path + object_path, "about"),
        ("DELETE", bucket_path + object_path, "delete"),
        ("GET", "/download" + bucket_path + object_path, "download"),
        ("POST", "/upload" + bucket_path + "/o", "upload"),
        ("POST", r"/session/(?P<session>\d+)", "upload_piece"),
        ("DELETE", r"/session/(?P<session>\d+)", "give_up"),
    ]

    def objects(self, bucket):
        if self.hub.token and self.token != self.hub.token:
            sent = self.headers.get("Authorization")
            raise _Refusal(401, "", f"Anonymous caller does not have storage.objects access: {sent}")
        if self.command in self.hub.refused:
            sent = self.headers.get("Authorization")
            raise _Refusal(403, "", f"someone@example.com may not do that: {self.token} {sent}")
        if bucket not in self.hub.objects:
            raise _Refusal(404, "", "The specified bucket does not exist.")
        return self.hub.objects[bucket]

    def find_object(self, bucket, name):
        objects = self.objects(bucket)
        if name not in objects:
            raise _Refusal(404, "", f"No such object: {bucket}/{name}")
        return objects[name]

    def entry(self, bucket, name):
        raw = self.hub.objects[bucket][name]
        digest = base64.b64encode(hashlib.md5(raw).digest()).decode()
        return {"bucket": bucket, "name": name, "size": str(len(raw)), "md5Hash": digest, "generation": "1"}

    def bucket(self, bucket):
        self.objects(bucket)
        self.send_json({"name": bucket})

    def list_objects(self, bucket):
        prefix, after = self.query.get("prefix", [""])[0], self.query.get("pageToken", [""])[0]
        names = sorted(name for name in self.objects(bucket) if name.startswith(prefix))
        cut = self.query.get("delimiter", [""])[0]
        folders = {prefix + name.removeprefix(prefix).split(cut)[0] + cut for name in names if cut and cut in name}
        names = [name for name in names if name > after and not any(name.startswith(folder) for folder in folders)]
        page, more = names[:PAGE], names[PAGE:]
        answer = {"kind": "storage#objects", "items": [self.entry(bucket, name) for name in page]}
        answer |= {"prefixes": sorted(folders)} if folders else {}
        self.send_json(answer | ({"nextPageToken": page[-1]} if more else {}))

    def about(self, bucket, name):
        self.find_object(bucket, name)
        self.send_json(self.entry(bucket, name))

    def delete(self, bucket, name):
        self.find_object(bucket, name)
        del self.hub.objects[bucket][name]
        self.answer(b"", 204)

    def download(self, bucket, name):
        self.send_file(self.find_object(bucket, name), {})

    def upload(self, bucket):
        objects = self.objects(bucket)
        if self.query["uploadType"] == ["resumable"]:
            session = str(len(self.hub.sessions))
            self.hub.sessions[session] = [bucket, json.loads(self.body)["name"], b""]
            return self.answer(b"", 200, {"Location": f"{self.hub.url}/session/{session}"})
        boundary = re.search('boundary="(.+)"', self.headers["Content-Type"])[1].encode()
        about, content = self.body.split(b"--" + boundary)[1:3]
        name = json.loads(about.split(b"\n\n", 1)[1])["name"]
        objects[name] = self.spoil(content.split(b"\n\n", 1)[1].removesuffix(b"\n"))
        self.send_json(self.entry(bucket, name))

    def upload_piece(self, session):
        bucket, name, before = self.hub.sessions[session]
        first, last, size = map(int, re.findall(r"\d+", self.headers["Content-Range"]))
        if first > len(before) or last - first + 1 != len(self.body):  # what came before may come again
            raise _Refusal(400, "", "a piece that does not follow the one before")
        whole = before[:first] + self.spoil(self.body)
        self.hub.sessions[session][2] = whole
        if len(whole) < size:
            return self.answer(b"", 308, {"Range": f"bytes=0-{len(whole) - 1}"})
        self.objects(bucket)[name] = whole
        self.send_json(self.entry(bucket, name))

    def give_up(self, session):
        self.hub.sessions.pop(session)
        self.answer(b"", 204)

    def spoil(self, raw):
        """What is stored of an upload: with a fault that flips, another bit; the answer is whole then."""
        if not (self.fault and self.fault.flip):
            return raw
        self.fault, half = None, len(raw) // 2
        return raw[:half] + bytes([raw[half] ^ 1]) + raw[half + 1 :]


Store.handler = _StoreHandler
