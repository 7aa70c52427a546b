"""onechip/card.py: the summary at the end of a run, and the card of its repository."""

import types

import huggingface_hub
import pytest

from onechip.card import describe_result, model_card

ABOUT = {
    "config": {"num_iterations": 7, "total_batch_size": 4, "seq_len": 16, "vocab_size": 1024, "n_head": 3},
    "data": {"name": "stdlib", "revision": "3.11.7", "shards": 5},
    "commit": "0123456789abcdef0123456789abcdef01234567+",
    "jax": "0.10.2",
    "device": "1 x cpu",
}


def result_in(folder, **scores):
    scores = {"val_loss": None, "val_bpb": None, "gzip_bpb": None, **scores}
    return types.SimpleNamespace(step=3, samples=[("a", "b\n")], run_dir=folder, **scores)


CONFIG = types.SimpleNamespace(num_iterations=7)


def test_what_is_left_in_a_run_are_its_results(tmp_path):
    """Files and folders as they are, of this start or an earlier one; event files once; no leftover of a kill."""
    for name in ("profile", "checkpoints", "model", ".model.x1.part"):
        (tmp_path / name).mkdir()
    for name in ("config.json", "events.out.tfevents.17", "events.out.tfevents.18", ".loss.png.x2.part"):
        (tmp_path / name).touch()
    lines = describe_result(result_in(tmp_path), CONFIG).splitlines()
    assert lines == [
        "trained: 3 of 7 steps",
        "sample: 'a' -> 'b\\n'",
        f"left in {tmp_path}: checkpoints/, config.json, events.*, model/, profile/",
    ]


@pytest.mark.parametrize("bpb, verdict", [(2.0, "20% below"), (3.0, "20% above")])
def test_a_result_is_compared_with_gzip(tmp_path, bpb, verdict):
    first, second, *_ = describe_result(
        result_in(tmp_path, val_loss=4.5, val_bpb=bpb, gzip_bpb=2.5), CONFIG
    ).splitlines()
    assert first == "trained: 3 of 7 steps, held-out loss 4.500 nats per token"
    assert second == f"held-out text: {bpb:.3f} bits per byte, {verdict} gzip -9 with 2.500"


def test_a_result_may_have_a_loss_alone(tmp_path):
    """A task that is not scored in bits per byte says what it has, and nothing of gzip."""
    text = describe_result(result_in(tmp_path, val_loss=4.5), CONFIG)
    assert "held-out loss 4.500 nats per token" in text and "gzip" not in text
    text = describe_result(result_in(tmp_path, val_loss=4.5, val_bpb=2.0), CONFIG)
    assert "held-out text: 2.000 bits per byte\n" in text and "gzip" not in text


@pytest.mark.parametrize(
    "scores, said",
    [
        (
            {"val_loss": 4.5, "val_bpb": 2.0, "gzip_bpb": 2.5},
            "2.000 bits per byte, where gzip -9 needs 2.500; 4.500 nats",
        ),
        ({"val_loss": 4.5, "val_bpb": 2.0}, "| held-out text | 2.000 bits per byte; 4.500 nats per token |"),
        ({"val_loss": 4.5}, "| held-out text | 4.500 nats per token |"),
        ({}, "| held-out text | not evaluated yet |"),
    ],
)
def test_a_card_says_how_good_as_far_as_it_is_known(tmp_path, scores, said):
    assert said in model_card(result_in(tmp_path, **scores), ABOUT, 12345, "pass")


def test_a_card_is_one_that_the_hub_reads(tmp_path):
    """Its header has licence, library, task and data; below are size, steps, data, commit, samples, code and config."""
    text = model_card(result_in(tmp_path), ABOUT, 12345, "print(1)\n", "someone/data", "Mind this.", "transformers")
    header = huggingface_hub.ModelCard(text).data
    assert (header.license, header.library_name, header.pipeline_tag) == ("mit", "transformers", "text-generation")
    assert header.datasets == ["someone/data"] and "onechip" in header.tags
    for said in (
        f"# {tmp_path.name}\n",
        "| size | 12,345 parameters, float32 |",
        "| trained | 3 of 7 steps of 64 tokens, 192 in all |",
        "| data | stdlib at revision `3.11.7`, 5 training shards |",
        "| tokenizer | byte-level BPE, 1,024 tokens |",
        "| trained with | commit 0123456789ab+, jax 0.10.2, 1 x cpu |",
        "```python\nprint(1)\n```\n\nMind this.\n",
        "'a' -> 'b\\n'",
        '"n_head": 3',
    ):
        assert said in text
    assert "loss.png" not in text, "a run without an evaluation has none"
    (tmp_path / "loss.png").touch()
    assert "\n\n![Training and held-out loss](loss.png)\n\n" in model_card(result_in(tmp_path), ABOUT, 1, "pass")


def test_a_card_does_not_need_all_of_it(tmp_path):
    """No dataset on the Hub, no sample, no git checkout."""
    result = result_in(tmp_path)
    result.samples = []
    text = model_card(result, ABOUT | {"commit": None}, 1, "pass")
    assert huggingface_hub.ModelCard(text).data.datasets is None
    assert "none were taken" in text and "commit unknown, jax" in text


def test_a_card_knows_tasks_without_shards(tmp_path):
    """A task may have data of another kind, or none that it names: what is missing is left out."""
    for data, row in [
        ({"name": "sums"}, "| data | sums |"),
        ({"name": "sums", "revision": "1"}, "| data | sums at revision `1` |"),
        ({"shards": 5}, "| data | 5 training shards |"),
    ]:
        assert row in model_card(result_in(tmp_path), ABOUT | {"data": data}, 1, "pass")
    for about in ({k: v for k, v in ABOUT.items() if k != "data"}, ABOUT | {"data": None}, ABOUT | {"data": {}}):
        assert "| data |" not in model_card(result_in(tmp_path), about, 1, "pass")


def test_a_card_names_the_weights_type_and_the_style(tmp_path):
    """An export may have other weights than float32, and another architecture than nanochat's."""
    text = model_card(result_in(tmp_path), ABOUT, 12, "pass", dtype="bfloat16", style="MaxText")
    assert "| size | 12 parameters, bfloat16 |" in text and "A GPT in the style of MaxText," in text
    assert {"maxtext", "onechip"} <= set(huggingface_hub.ModelCard(text).data.tags) and "nanochat" not in text
