"""A chat model's tool: what it writes between python_start and python_end is run, and its output is forced back.

    run = ToolRunner(tokens, tokenizer.decode, calculate)
    Request(..., stop=(tokens.assistant_end,), pause=run.pause, hook=run.hook)

A runner serves all answers of an engine.
"""

from concurrent.futures import Executor

LONGEST_OUTPUT = 256  # tokens of a result that a model reads


class ToolRunner:
    """Runs the programs that answers have in them.

    tokens: ChatTokens; decode(ids) -> text; run(text) -> what it printed; where that is None, or an error, nothing is
    forced and the model writes on. pool: an Executor for tools that take longer: the row waits while others are
    written. None: `run` is called at once.
    """

    def __init__(self, tokens, decode, run, pool: Executor | None = None):
        self._tokens, self._decode, self._run, self._pool = tokens, decode, run, pool

    @property
    def pause(self):
        """The token after which an answer waits for its tool."""
        return (self._tokens.python_end,)

    def hook(self, answer, new):
        """A Request's hook: acts where the answer's newest token is a python_end of the model's own."""
        if new[-1] != self._tokens.python_end or not answer.mask[-1]:
            return
        ids = program_of(answer.tokens, self._tokens)
        if ids is None:
            return
        if self._pool is None:
            return answer.force(self._output(ids))
        answer.hold()
        done = self._pool.submit(self._output, ids)
        done.add_done_callback(lambda done: answer.force(done.result()))

    def _output(self, ids):
        """The ids of a program's output with its delimiters; none if it has none."""
        try:
            text = self._run(self._decode(ids))
        except Exception:  # what the tool cannot run is the model's doing, and no reason to end its answer
            return []
        if text is None:
            return []
        output = self._tokens.encode(text)[:LONGEST_OUTPUT]
        return [self._tokens.output_start, *output, self._tokens.output_end]


def program_of(written, tokens):
    """The ids between the last python_start and the python_end that ends an answer; None if nothing was opened."""
    before = written[:-1]
    for at in range(len(before) - 1, -1, -1):
        if before[at] == tokens.python_start:
            return before[at + 1 :]
        if before[at] == tokens.python_end:
            return None
    return None
