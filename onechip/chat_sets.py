"""Conversations of the Hub to learn from: SmolTalk, MMLU's auxiliary questions, GSM8K, nanochat's spelling."""

from onechip.chat_tasks import gsm8k_item, mmlu_item
from onechip.conversations import check_messages
from onechip.errors import UserError
from onechip.hubdata import Table, open_rows
from onechip.mixture import TalkSource
from onechip.spelling import read_words, shuffled_words, simple_spelling_item, spelling_bee_item

MMLU_COLUMNS = ("question", "choices", "answer", "subject")
# {name: (Table to learn from, Table to be asked, row -> messages)}
HUB_SETS = {
    "smoltalk": (
        Table("HuggingFaceTB/smol-smoltalk", "default", "train", ("messages",)),
        Table("HuggingFaceTB/smol-smoltalk", "default", "test", ("messages",)),
        lambda row: row["messages"],
    ),
    "mmlu": (
        Table("cais/mmlu", "all", "auxiliary_train", MMLU_COLUMNS),
        Table("cais/mmlu", "all", "validation", MMLU_COLUMNS),
        lambda row: mmlu_item(row)["messages"],
    ),
    "gsm8k": (
        Table("openai/gsm8k", "main", "train", ("question", "answer")),
        Table("openai/gsm8k", "main", "test", ("question", "answer")),
        lambda row: gsm8k_item(row)["messages"],
    ),
}
SPELLING_SETS = {
    "simple-spelling": (simple_spelling_item, shuffled_words),
    "spelling-bee": (spelling_bee_item, list),
}


def reader_of_rows(name, table, make):
    """(messages(number), the commit of the table): UserError names the row that is no conversation."""
    rows = open_rows(table)

    def messages(number):
        try:
            found = make(rows.row(number))
            check_messages(found)
            return found
        except (UserError, TypeError, KeyError, AttributeError, ValueError) as error:
            place = number % rows.size
            raise UserError(f"{name}: row {place} of the shuffled ones is no conversation ({error})") from None

    return messages, rows.revision


def hub_source(name):
    """(TalkSource, {split: commit}) of a key of HUB_SETS; what is not here is downloaded."""
    learned, asked, make = HUB_SETS[name]
    (messages, revision), (held_out, other) = (reader_of_rows(name, table, make) for table in (learned, asked))
    return TalkSource(name, messages, held_out), {learned.split: revision, asked.split: other}


def spelling_source(name):
    """The TalkSource of a key of SPELLING_SETS: nanochat's rules, on words.txt."""
    make, arrange = SPELLING_SETS[name]
    words = arrange(read_words())
    item = lambda test: lambda number: make(number, words, test)["messages"]
    return TalkSource(name, item(False), item(True))
