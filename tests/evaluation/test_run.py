"""A whole run: gates, rows, going on after a stop, what is refused, and what the bundled model shows."""

import copy
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ragkv import MethodError, PromptTemplate, bundled
from ragkv.evaluation import Bench, EvaluationError, GateError, Plan, evaluate, parse_arms, read_cases
from ragkv.evaluation.answering import replies
from ragkv.evaluation.arms import Arm
from ragkv.evaluation.gates import run_gates
from ragkv.evaluation.report import page, tables
from ragkv.evaluation.rows import Rows
from ragkv.evaluation.scoring import Group
from ragkv.evaluation.summary import METRICS
from ragkv.evaluation.tokens import look_at
from ragkv.kernels import Rotation
from ragkv.library.measured import Measured
from ragkv.methods import FullPrefill, LegoLink, Reuse
from ragkv.testing import tiny_model

ARMS = parse_arms(
    ["full-prefill", "full-documents", "gold-only", "no-context", "reuse", "no-rotation@alone", "lego-link"], [0.2]
)


@pytest.fixture
def plan(small_case):
    def made(**changes):
        fields = {
            "model": "tiny",
            "data": "ours",
            "cases": [small_case("a"), small_case("b", kind="direct")],
            "arms": ARMS,
        }
        return Plan(**{**fields, "orders": 2, "timed": 1, **changes})

    return made


def lines(folder):
    return (folder / "rows.jsonl").read_text().splitlines()


def test_several_jobs_need_to_make_their_benches(tiny_bench, tmp_path, plan):
    with pytest.raises(EvaluationError, match="make_bench"):
        evaluate(tiny_bench, plan(), tmp_path / "out", jobs=2)
    assert not (tmp_path / "out").exists()


def test_names_that_are_no_unicode(tiny_bench, tmp_path, plan):
    """A file's name on the command line need not be."""
    named = {"model": "m\udcff", "data": "d\udcff", "command": "ragkv eval --data d\udcff", "timed": 0}
    for orders in (1, 2):  # the second goes on in what the first has written
        found = evaluate(tiny_bench, plan(**named, orders=orders), tmp_path).summary
        assert json.loads((tmp_path / "summary.json").read_text())["data"] == found["data"] == "d\udcff"
    assert len(lines(tmp_path)) == 2 * 2 * len(ARMS)


def test_a_run(tiny_bench, tmp_path, plan):
    found = evaluate(tiny_bench, plan(), tmp_path).summary
    rows = [json.loads(line) for line in lines(tmp_path)]
    assert len(rows) == 2 * 2 * len(ARMS)
    assert found["slices"] == {"all": 2, "cross": 1, "direct": 1, "order as given": 2, "order shuffled": 2}
    arms = {arm["name"]: arm for arm in found["arms"]}
    assert [gate["passed"] for gate in found["gates"]] == [True] * 5
    full = arms["full-prefill"]
    assert (full["n"], full["prompts"], full["refused"]) == (2, 4, {})
    assert full["scores"]["all"]["kl_chunks"].mean == 0 and full["cost"]["budget"] == 1
    assert arms["reuse@alone"]["cost"]["budget"] == 0 < arms["reuse@alone"]["scores"]["all"]["kl_chunks"].mean
    assert 0 < arms["lego-link:k=20%@alone"]["cost"]["budget"] < 0.3
    assert arms["full-documents"]["against_documents"]["all"]["em"] == (0, 0, 0, 2)
    for arm in (arms["reuse@document"], arms["lego-link:k=20%@alone"]):
        cost = arm["cost"]
        assert cost["timed"] == 1 and cost["bytes_read"] > 0 and cost["cold_read_ms"] > 0
        assert cost["kv_bytes"] > 0 and cost["ttft_ms"] > 0 and cost["disk_ms"] > 0
    assert json.loads((tmp_path / "summary.json").read_text())["cases"] == 2
    assert len(tiny_bench.engine.store.stats().entries) and tiny_bench.engine.store.stats().entries["cpu"] == 0


def test_all_arms_of_the_same_chunks_have_the_same_ids(tiny_bench, tmp_path, plan):
    evaluate(tiny_bench, plan(timed=0), tmp_path)
    ids = {}
    for row in map(json.loads, lines(tmp_path)):
        if row["arm"] not in ("gold-only", "no-context", "full-documents"):
            ids.setdefault((row["case"], row["order"]), set()).add(row["ids"])
    assert len(ids) == 4 and all(len(found) == 1 for found in ids.values())


def test_other_ids_are_found_out(tiny_bench, small_case):
    case = small_case()
    group = Group(tiny_bench, case, 0, tiny_bench.read(case))
    arm = Arm("reuse@alone", method=Reuse())
    object.__setattr__(arm, "places", lambda case: case.retrieved[::-1])
    with pytest.raises(EvaluationError, match="reuse@alone was given other token ids"):
        list(group.rows([arm]))


class Stopped(Exception):
    pass


def stop_after(count, error=Stopped):
    def progress(items, what):
        for number, item in enumerate(items):
            if what == "cases" and number == count:
                raise error
            yield item

    return progress


def test_a_stopped_run_goes_on(tiny_bench, tmp_path, monkeypatch, plan):
    with pytest.raises(Stopped):
        evaluate(tiny_bench, plan(timed=0), tmp_path, progress=stop_after(1))
    before = lines(tmp_path)
    assert len(before) == 2 * len(ARMS)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"case": "b", "kind": "dire')  # killed while it wrote
    scored = []
    monkeypatch.setattr("ragkv.evaluation.asking.Group", lambda *args: scored.append(args[1].id) or Group(*args))
    resumed = evaluate(tiny_bench, plan(timed=0), tmp_path)
    assert lines(tmp_path)[: len(before)] == before
    assert scored == ["b", "b"] and len(lines(tmp_path)) == 2 * len(before)
    again = evaluate(tiny_bench, plan(timed=0), tmp_path)
    assert scored == ["b", "b"] and again.summary["arms"] == resumed.summary["arms"]


def test_an_interrupted_run_adds_up_what_there_is(tiny_bench, tmp_path, plan):
    with pytest.raises(KeyboardInterrupt):  # no row yet
        evaluate(tiny_bench, plan(timed=0), tmp_path, progress=stop_after(0, KeyboardInterrupt))
    found = evaluate(tiny_bench, plan(), tmp_path, progress=stop_after(1, KeyboardInterrupt))
    assert found.interrupted and found.tokens == {} and found.summary["stopped"]
    assert {arm["n"] for arm in found.summary["arms"]} == {1} and found.summary["cases"] == 2
    assert json.loads((tmp_path / "summary.json").read_text())["stopped"]
    found = evaluate(tiny_bench, plan(), tmp_path)
    assert not (found.interrupted or found.summary["stopped"]) and {arm["n"] for arm in found.summary["arms"]} == {2}


def test_a_time_limit_ends_a_run_behind_a_row(tiny_bench, tmp_path, plan):
    arms, cases = ARMS[:3], plan().cases[:1]
    for count in range(1, 2 * len(arms) + 1):
        found = evaluate(tiny_bench, plan(time_limit_s=0, arms=arms, cases=cases, timed=0), tmp_path)
        assert len(lines(tmp_path)) == count and found.summary["stopped"] and not found.interrupted
    assert not evaluate(tiny_bench, plan(time_limit_s=0, arms=arms, cases=cases, timed=0), tmp_path).summary["stopped"]
    rows = lines(tmp_path)
    assert len({(row["order"], row["arm"]) for row in map(json.loads, rows)}) == len(rows) == 2 * len(arms)


def test_without_answers_the_first_token_is_compared(loaded, tmp_path, plan):
    bench = Bench(tiny_model(vocab_size=1792), loaded[1], PromptTemplate(**bundled.TEMPLATE), max_new_tokens=0)
    found = evaluate(bench, plan(timed=0), tmp_path)
    scores = {arm["name"]: arm["scores"]["all"] for arm in found.summary["arms"]}
    assert scores["reuse@alone"]["kl_chunks"].mean > 0 and "perplexity" in scores["reuse@alone"]
    assert not {"em", "f1", "same_chunks", "answer"} & {*scores["reuse@alone"], *json.loads(lines(tmp_path)[0])}
    assert page(found.summary, found.tokens, METRICS["kl_chunks"]) and tables(found.summary, METRICS["kl_chunks"])


def test_an_instruction_stands_in_front_of_the_question(loaded, tmp_path, plan, small_case):
    """So no document's KV depend on it."""
    plain = Bench(tiny_model(vocab_size=1792), loaded[1], PromptTemplate(**bundled.TEMPLATE))
    asking = Bench(plain.engine.model, loaded[1], PromptTemplate(**bundled.TEMPLATE), instruction="Be brief.")
    case = small_case()
    assert asking.engine.encoder.prefix == plain.engine.encoder.prefix
    text = loaded[1].decode(asking.engine.encoder.suffix(case.question))
    assert text == f"Be brief.\n\n{loaded[1].decode(plain.engine.encoder.suffix(case.question))}"
    assert asking.like().engine.template == asking.engine.template
    evaluate(plain, plan(timed=0, arms=ARMS[:1]), tmp_path)
    with pytest.raises(EvaluationError, match=r"other settings \(instruction: None there, 'Be brief.' now"):
        evaluate(asking, plan(timed=0, arms=ARMS[:1]), tmp_path)


def test_an_answer_ends_with_its_turn(loaded, small_case):
    """Also where the model's generation settings do not know the token that ends a turn."""
    tokenizer = copy.deepcopy(loaded[1])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]<end>{% endfor %}"
    bench = Bench(tiny_model(vocab_size=len(tokenizer)), tokenizer)
    assert tokenizer.convert_tokens_to_ids("<end>") in bench.ends
    stop = Bench(bench.engine.model, tokenizer, PromptTemplate(stop=" "), max_new_tokens=8)
    [outcome] = stop.answers([stop.fuse([], small_case(), FullPrefill())], small_case())
    assert " " not in outcome.text


def test_further_arms_join_a_run(tiny_bench, tmp_path, plan):
    evaluate(tiny_bench, plan(arms=ARMS[:2], timed=0), tmp_path)
    before = lines(tmp_path)
    found = evaluate(tiny_bench, plan(timed=0), tmp_path)
    assert lines(tmp_path)[: len(before)] == before
    assert {arm["prompts"] for arm in found.summary["arms"]} == {4}


@pytest.mark.parametrize(
    "change", [{"seed": 5}, {"model": "other"}, {"data": "theirs"}, {"cases": "others"}, {"max_new_tokens": 5}], ids=str
)
def test_rows_of_other_settings_are_not_mixed(tiny_bench, tmp_path, change, plan, small_case):
    change = {"cases": [small_case("z")]} if "cases" in change else dict(change)
    evaluate(tiny_bench, plan(timed=0, arms=ARMS[:1]), tmp_path)
    tiny_bench.max_new_tokens = change.pop("max_new_tokens", tiny_bench.max_new_tokens)
    with pytest.raises(EvaluationError, match=r"a run of other settings .* give another folder"):
        evaluate(tiny_bench, plan(timed=0, arms=ARMS[:1], **change), tmp_path)


def test_rows_of_a_changed_case_are_not_mixed(tiny_bench, tmp_path, plan, small_case):
    """Edited data, or other --chunk-words: the first case may be the same, and ids are."""
    evaluate(tiny_bench, plan(timed=0, arms=ARMS[:1]), tmp_path)
    changed = [small_case("a"), small_case("b", kind="direct", question="Who plays the harp?")]
    with pytest.raises(EvaluationError, match=r"case b is not the one that was asked before"):
        evaluate(tiny_bench, plan(timed=0, arms=ARMS[:1], cases=changed), tmp_path)


def test_damaged_rows_are_named(tiny_bench, tmp_path, plan):
    evaluate(tiny_bench, plan(timed=0, arms=ARMS[:1]), tmp_path)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("nonsense\n")
    with pytest.raises(EvaluationError, match="line 5 is no row"):
        evaluate(tiny_bench, plan(timed=0, arms=ARMS[:1]), tmp_path)


def test_a_wrong_rotation_stops_the_run(tiny_bench, tmp_path, plan):
    decoder = tiny_bench.engine.decoder
    decoder.rotations = [Rotation(rotation.inv_freq * 1.1, rotation.interleaved) for rotation in decoder.rotations]
    told = []
    with pytest.raises(GateError, match="layer-0 keys rotated = computed there' failed"):
        evaluate(tiny_bench, plan(), tmp_path, passed=told.append)
    assert [gate.passed for gate in told] == [True, True, True, False]
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_mask_that_shows_too_much_stops_the_run(tiny_bench, small_case):
    decoder = tiny_bench.engine.decoder
    decoder.rules = [lambda batch, head, query, key: key >= 0 * query for _ in decoder.rules]
    failed = [gate.name for gate in run_gates(tiny_bench, small_case()) if not gate.passed]
    assert "scattered tokens are exact" in failed


@pytest.mark.parametrize("architecture", ["mistral", "gemma3_text"])
def test_gates_look_behind_the_window(loaded, architecture, small_case):
    """The model's own cache would forget what a window hides, and nothing could be compared."""
    bench = Bench(tiny_model(architecture, vocab_size=1792), loaded[1], max_new_tokens=2)
    assert all(gate.passed for gate in run_gates(bench, small_case()))
    turned = [Rotation(rotation.inv_freq * 1.1, rotation.interleaved) for rotation in bench.engine.decoder.rotations]
    bench.engine.decoder.rotations = turned
    failed = [gate.name for gate in run_gates(bench, small_case()) if not gate.passed]
    assert "layer-0 keys rotated = computed there" in failed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gates_know_the_noise_of_half_precision(loaded, dtype, small_case):
    model = tiny_model(vocab_size=1792, initializer_range=0.05)
    inv_freq = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    model = model.to(dtype)
    for name, buffer in model.named_buffers():
        if name in inv_freq:
            buffer.data = inv_freq[name]
    gates = list(run_gates(Bench(model, loaded[1]), small_case()))
    assert gates[0].error < 0.1 and all(gate.limit > 5e-3 for gate in gates)
    assert all(gate.passed for gate in gates), gates


def test_a_model_that_refuses_a_method(loaded, tmp_path, plan, small_case):
    shallow = Bench(tiny_model(vocab_size=1792, num_hidden_layers=2), loaded[1], max_new_tokens=2)
    arms = parse_arms(["full-prefill", "cache-blend:check_layer=3@alone"], [])
    found = evaluate(shallow, plan(arms=arms, cases=[small_case()]), tmp_path).summary["arms"]
    assert found[1]["refused"] == {"CacheBlend: check_layer 3 of a model with 2 layers": 2}
    assert (found[1]["n"], found[1]["cost"]) == (0, {})
    assert found[0]["n"] == 1


def test_cases_longer_than_the_model_are_counted(loaded, tmp_path, plan, small_case):
    short = Bench(tiny_model(vocab_size=1792, max_position_embeddings=160), loaded[1], max_new_tokens=4)
    long = small_case("long", documents=(("word " * 200,),), retrieved=((0, 0),), gold=())
    found = evaluate(short, plan(cases=[long, small_case("a"), small_case("b")], limit=1, timed=0), tmp_path).summary
    assert found["left_out"] == {"longer than the model's positions": 1} and found["cases"] == 1
    with pytest.raises(EvaluationError, match="no case can be asked of a model of 160 positions"):
        evaluate(short, plan(cases=[long]), tmp_path / "none")


def test_documents_longer_than_the_model_are_refused_but_their_chunks_are_not(loaded, tmp_path, plan, small_case):
    short = Bench(tiny_model(vocab_size=1792, max_position_embeddings=160), loaded[1], max_new_tokens=4)
    case = small_case(documents=(("Anna plays.", *["word " * 30] * 6),), retrieved=((0, 0),), gold=())
    found = {arm["name"]: arm for arm in evaluate(short, plan(cases=[case], timed=0), tmp_path).summary["arms"]}
    assert "positions" in next(iter(found["full-documents"]["refused"]))
    assert "kl_documents" not in found["reuse@alone"]["scores"]["all"]
    assert found["reuse@alone"]["n"] == 1


def test_what_the_tokenizer_leaves_nothing_of_is_left_out(tmp_path, plan, small_case):
    """And fewer orders than were asked before are what is added up."""
    letters = ["<unk>", *" \nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?:"]
    backend = Tokenizer(
        models.BPE({letter: at for at, letter in enumerate(letters)}, [])
    )  # what it does not know is gone
    bench = Bench(tiny_model(), PreTrainedTokenizerFast(tokenizer_object=backend), max_new_tokens=1)
    strange = (("東京",), ("Oslo lies on a river.",))
    cases = [
        small_case("a"),
        small_case("b", question="東京"),
        small_case("c", documents=strange, retrieved=((0, 0), (1, 0)), gold=()),
    ]
    arms = parse_arms(["full-prefill", "reuse@document"], [])
    found = evaluate(bench, plan(cases=cases, arms=arms, timed=0), tmp_path).summary
    assert found["left_out"] == {"a text of which the tokenizer leaves nothing": 2}
    assert [arm["prompts"] for arm in found["arms"]] == [2, 2]
    found = evaluate(bench, plan(cases=cases, arms=arms, timed=0, orders=1), tmp_path).summary
    assert [arm["prompts"] for arm in found["arms"]] == [1, 1] and found["slices"] == {"all": 1}


@pytest.mark.parametrize("name", ["limit", "orders"])
def test_plans_are_checked(name, plan):
    with pytest.raises(EvaluationError, match=f"{name} must be at least 1, got 0"):
        plan(**{name: 0})


@pytest.mark.parametrize("gold", ["harp", "not stated", "Zishi Dreyham and more words than it says"])
def test_answers_are_those_of_plain_greedy_decoding(bundled_bench, gold):
    engine = bundled_bench.engine
    for case in read_cases(bundled.CASES_PATH)[1][:4]:
        chunks = engine.add([case.text(place) for place in case.retrieved[:4]])
        for method in (FullPrefill(), LegoLink(4)):
            want = engine.generate(chunks, case.question, method=method, max_new_tokens=6).text
            prompt = engine.fuse(chunks, case.question, method=method)
            [got] = replies(engine.runner.steps(), [prompt], engine.encoder.ids(gold), bundled_bench.ends, 6)
            assert engine.encoder.decode(got.ids) == want


def test_the_perplexity_of_the_gold_answer(tiny_bench, small_case):
    engine, case = tiny_bench.engine, small_case()
    chunks = engine.add([case.text(place) for place in case.retrieved])
    gold = tiny_bench.gold_ids(case)
    prompt = engine.fuse(chunks, case.question, method=FullPrefill())
    ids = torch.cat([prompt.input_ids[0], torch.tensor(gold)])
    with torch.no_grad():
        logits = engine.model(ids[None]).logits[0, -len(gold) - 1 : -1]
    want = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(gold))
    [got] = replies(engine.runner.steps(), [prompt], gold, tiny_bench.ends, 4)
    assert got.gold_nll == pytest.approx(float(want), rel=1e-4)


def test_the_tokens_of_one_prompt(tiny_bench, small_case):
    before = tiny_bench.engine.model.config._attn_implementation
    case = small_case()
    found = look_at(tiny_bench, case, ARMS, {})
    assert tiny_bench.engine.model.config._attn_implementation == before
    count = len(found["tokens"])
    assert "".join(found["tokens"]).count("harp") == 1
    assert len(found["chunks"]) == 6 and found["gold"] == [1]
    first, second = found["chunks"][0], found["chunks"][2]
    for context, values in found["deviation"].items():
        assert len(values) == count
        assert max(values[: first[1]]) < 1e-4, "what stands behind the prefix is exact"
        assert max(values[second[0] : second[1]]) > 0.01, context
    assert max(found["deviation"]["document"][: second[0]]) < 1e-4 < max(found["deviation"]["alone"][: second[0]])
    assert len(found["attention"]) == count and sum(found["attention"]) == pytest.approx(1, abs=1e-2)
    assert found["recomputed"]["lego-link:k=20%@alone"]


def test_what_the_bundled_model_shows(bundled_bench, tmp_path, plan):
    """Relations with a wide margin only: the model may be trained anew."""
    cases = [case for case in read_cases(bundled.CASES_PATH)[1][:40] if case.kind in ("cross", "unnamed")]
    arms = parse_arms(["full-prefill", "full-documents", "reuse", "no-context"], [])
    found = evaluate(bundled_bench, plan(cases=cases, arms=arms, orders=1, timed=0), tmp_path).summary
    share = {
        arm["name"]: {name: arm["scores"][name]["em"].mean for name in ("cross", "unnamed")} for arm in found["arms"]
    }
    assert share["full-prefill"]["cross"] >= share["reuse@alone"]["cross"] + 0.3
    assert share["reuse@document"]["cross"] >= share["reuse@alone"]["cross"] + 0.3
    assert share["full-documents"]["unnamed"] >= share["full-prefill"]["unnamed"] + 0.3
    assert share["reuse@document"]["unnamed"] >= share["full-prefill"]["unnamed"] + 0.3
    assert share["no-context"]["cross"] <= 0.3


@pytest.mark.parametrize(("architecture", "shown"), [("llama", True), ("falcon", False)])
def test_what_chunks_attend_to_is_measured_when_they_are_read_where_the_model_shows_it(
    loaded, architecture, shown, small_case
):
    """Else the arm that needs it is refused, and no other; and none is charged for reading twice."""
    measured = Measured.SENSITIVITY | Measured.ATTENDED
    bench = Bench(tiny_model(architecture, vocab_size=1792), loaded[1], max_new_tokens=0, measured=measured)
    case, engine = small_case(), bench.engine
    chunks = list(bench.read(case).chunks["document"].values())[::-1]
    assert engine.documents.measured == (measured if shown else Measured.SENSITIVITY)
    assert engine.fuse(chunks, case.question, method="sensitive-tokens").report.read_tokens == 0
    if shown:
        assert engine.fuse(chunks, case.question, method="cache-craft").report.read_tokens == 0
    else:
        with pytest.raises(MethodError, match="not open to view"):
            engine.fuse(chunks, case.question, method="cache-craft")


def test_rows_that_are_whole_are_never_written_again(tmp_path, monkeypatch):
    """What is killed while it drops a row that was cut short loses nothing else."""
    row = {"case": "a", "order": 0, "arm": "reuse@alone"}
    Rows(tmp_path, {}).add(row)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"case": "b", "or')

    def killed(*_):
        raise OSError("killed")

    monkeypatch.setattr(Path, "write_bytes", killed)
    assert Rows(tmp_path, {}).all() == [row]
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == row
