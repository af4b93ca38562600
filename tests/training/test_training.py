"""Data, model, optimizer and export of the bundled model's training, on small sizes."""

import random

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ragkv.bundled import MODEL_PATH, TEMPLATE
from ragkv.evaluation import Plan as EvaluationPlan
from ragkv.evaluation import parse_arms
from training import order
from training.cases import generated_cases
from training.data import IGNORED, Encoder, Stage, _spread, batches, encode_context
from training.evaluate import context_kv, evaluate, prefill, right
from training.export import export, to_llama
from training.model import Reader, Size
from training.optim import orthogonalize
from training.ranking import summary_of
from training.ranking import table as ranking_table
from training.tokenizer import HEADS, TAILS
from training.train import Plan, TrainingRun, between
from training.world.generator import Question, questions
from training.world.names import HELDOUT_NAMES, TRAINING_NAMES, Entity
from training.world.writer import Context, Shape, write_context

SHAPE = Shape(documents=(3, 4), chunks=(1, 2), words=(6, 14), facts=(1, 2))
STAGE = Stage(4, SHAPE, context=192, asked=160, batch=2, longest_gap=100)


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(MODEL_PATH)


@pytest.fixture
def size(tokenizer):
    return Size(
        layers=3,
        hidden=32,
        heads=2,
        kv_heads=1,
        intermediate=48,
        vocabulary=len(tokenizer),
        subject_layer=0,
        evidence_layer=1,
    )


def test_places_point_at_values(tokenizer):
    rng, encoder = random.Random(0), Encoder(tokenizer)
    for _ in range(20):
        context = write_context(rng, SHAPE)
        example = encode_context(encoder, context, rng, longest_gap=50)
        assert len(example.ids) == len(example.positions)
        assert all(b > a for a, b in zip(example.positions, example.positions[1:], strict=False))
        for fact in context.facts:
            assert tokenizer.decode([example.ids[i] for i in example.place_of(fact)]).strip() == fact.value


def test_segments_are_tokenised_alone(tokenizer):
    rng, encoder = random.Random(1), Encoder(tokenizer)
    context = write_context(rng, SHAPE)
    ids = [tokenizer.bos_token_id, *encoder.ids(TEMPLATE["prefix"])]
    for text in context.chunks:
        ids += encoder.ids(TEMPLATE["before_chunk"]) + encoder.ids(text) + encoder.ids(TEMPLATE["after_chunk"])
    assert encode_context(encoder, context, rng, longest_gap=0).ids == ids


def test_batches_repeat_and_targets_are_answers(tokenizer):
    one, two = next(batches(tokenizer, STAGE, 7)), next(batches(tokenizer, STAGE, 7))
    assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(two).values(), strict=True))
    wanted = one.target != IGNORED
    assert wanted.any() and (one.segment[wanted] >= 0).all()
    copied = one.evidence >= 0
    assert torch.equal(one.context.gather(1, one.evidence.clamp(min=0))[copied], one.target[copied])


def test_workers_make_batches_that_repeat(tokenizer):
    def first_three():
        source = batches(tokenizer, STAGE, 7, workers=1)
        return [next(source) for _ in range(3)]

    one, two = first_three(), first_three()
    assert all(torch.equal(a.asked, b.asked) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0].asked, one[1].asked)


def test_losses_equal_the_exported_model(tokenizer, size):
    """Reading a context once with packed questions is what the exported model computes on each prompt alone."""
    torch.manual_seed(0)
    reader = Reader(size)
    for layer in reader.model.layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=0.2)
    batch = next(batches(tokenizer, STAGE, 3))
    llama = to_llama(reader.state_dict(), size, tokenizer)
    nll = []
    for b in range(STAGE.batch):
        length = int(batch.length[b])
        for number in range(int(batch.segment[b].max()) + 1):
            own = batch.segment[b] == number
            ids = torch.cat((batch.context[b, :length], batch.asked[b, own]))[None]
            positions = torch.cat((batch.context_positions[b, :length], batch.asked_positions[b, own]))[None]
            with torch.no_grad():
                logits = llama(ids, position_ids=positions).logits[0, length:]
            target = batch.target[b, own]
            nll.append(
                torch.nn.functional.cross_entropy(logits, target, ignore_index=IGNORED, reduction="none")[
                    target != IGNORED
                ]
            )
    with torch.no_grad():
        losses = reader.losses(batch, 4)
    torch.testing.assert_close(losses["answer"], torch.cat(nll).mean(), atol=1e-4, rtol=1e-4)


def test_newton_schulz_makes_orthogonal():
    torch.manual_seed(0)
    for shape in [(2, 8, 8), (1, 16, 6), (1, 6, 16)]:
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert values.min() > 0.4 and values.max() < 1.4


def test_run_resumes_where_it_was(tokenizer, size, tmp_path):
    def run(folder, steps):
        stage = Stage(**{**vars(STAGE), "steps": steps})
        made = TrainingRun(folder, size, Plan(), (stage,), "cpu", seed=0)
        made.train(tokenizer, compiled=False, every=1, save_every=1)
        return made

    first = run(tmp_path / "a", 2)
    again = run(tmp_path / "a", 3)
    assert (first.step, again.step) == (2, 3)
    rows = (tmp_path / "a" / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "1", "2", "3"]


def test_export_is_loadable_and_whole(tokenizer, size, tmp_path):
    from transformers import AutoModelForCausalLM

    reader = Reader(size)
    llama = to_llama(reader.state_dict(), size, tokenizer)
    ids = torch.tensor([[1, 5, 9]])
    expected = llama(ids).logits
    for _ in range(2):
        export(llama, tokenizer, tmp_path / "model")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        torch.testing.assert_close(loaded(ids).logits, expected, atol=2e-2, rtol=2e-2)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_stage_sets_rates_and_helpers(tokenizer, size, tmp_path):
    first = Stage(**{**vars(STAGE), "steps": 4, "rate": (1.0, 0.5), "helper": (1.0, 0.0)})
    last = Stage(**{**vars(STAGE), "steps": 2, "rate": (0.5, 0.1)})
    run = TrainingRun(tmp_path, size, Plan(), (first, last), "cpu", seed=0)
    seen = []
    for run.step in range(6):
        stage, done = run.stage()
        seen.append((between(stage.rate, done), between(stage.helper, done)))
    assert seen == [(1.0, 1.0), (0.875, 0.75), (0.75, 0.5), (0.625, 0.25), (0.5, 1.0), (pytest.approx(0.3), 1.0)]


@pytest.mark.parametrize("names", [TRAINING_NAMES, HELDOUT_NAMES], ids=["trained", "held out"])
def test_a_name_part_is_its_head_and_its_tail(tokenizer, names):
    """A held-out name is cut as the names of training are: into tokens that training knows."""
    for part in (*names.first, *names.last, *names.firm, *names.town):
        head, tail = tokenizer.tokenize(part)
        assert head.lstrip("▁") in HEADS and tail in TAILS
        assert tokenizer.tokenize(f"to {part}'s")[1:3] == [head, tail]


def test_document_in_place_is_exact(tokenizer, size):
    """One document right behind the prefix: prefilled alone it has the KV that the whole prompt has."""
    torch.manual_seed(0)
    llama, encoder, rng = to_llama(Reader(size).state_dict(), size, tokenizer), Encoder(tokenizer), random.Random(2)
    context = write_context(rng, Shape(documents=(1, 1), types=(1, 1), chunks=(2, 2), words=(6, 10), notes=0.0))
    with torch.no_grad():
        full, reuse = (context_kv(llama, encoder, context, arm) for arm in ("full", "document"))
    for (k, v), (k2, v2) in zip(full, reuse, strict=True):
        torch.testing.assert_close(k, k2, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(v, v2, atol=1e-4, rtol=1e-4)


def test_a_gap_moves_the_context_and_leaves_the_prefix(tokenizer, size):
    """Layer 0 knows of a token only its id and its position, so its keys are the same however they came about."""
    torch.manual_seed(0)
    llama, encoder, rng = to_llama(Reader(size).state_dict(), size, tokenizer), Encoder(tokenizer), random.Random(2)
    context, start = write_context(rng, SHAPE), len(encoder.prefix)
    with torch.no_grad():
        near, far, chunk = (
            context_kv(llama, encoder, context, arm, gap)[0][0]
            for arm, gap in (("full", 0), ("full", 700), ("chunk", 700))
        )
    torch.testing.assert_close(far, chunk, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(far[:, :, :start], near[:, :, :start])
    assert not torch.allclose(far[:, :, start:], near[:, :, start:], atol=1e-2)


def test_kinds_take_turns_and_some_come_twice():
    kinds = ["direct"] * 4 + ["order"] * 4 + ["absent"]
    found = [Question(str(number), "", kind) for number, kind in enumerate(kinds)]
    assert [q.kind for q in _spread(found, ())[:5]] == ["direct", "order", "absent", "direct", "order"]
    twice = _spread(found, ("order",))
    assert [q.kind for q in twice[:4]] == ["direct", "order", "order", "absent"]
    assert sorted(q.text for q in twice) == sorted(q.text for q in found)


@pytest.mark.parametrize("helper", ["subject", "evidence"])
def test_a_helper_of_no_weight_changes_nothing(helper, tokenizer, size, tmp_path):
    """A step with one helper's weight at 0 is a step on the losses without it."""

    def weights(name, plan, drop):
        run = TrainingRun(tmp_path / name, size, plan, (STAGE,), "cpu", seed=0)
        run.low_precision = False
        for layer in run.model.model.layers:
            torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=0.2)
            torch.nn.init.normal_(layer.mlp.down_proj.weight, std=0.2)
        run.update(batch, lambda *a: {k: v.detach() if k in drop else v for k, v in run.model.losses(*a).items()})
        return torch.cat([p.detach().flatten() for n, p in run.model.named_parameters() if not n.startswith("subject")])

    batch = next(batches(tokenizer, STAGE, 3))
    without = weights("without", Plan(**{helper: 0.0}), ())
    torch.testing.assert_close(without, weights("dropped", Plan(), (helper,)), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(without, weights("with", Plan(), ()), atol=1e-6)


def test_teacher_forcing_is_greedy_decoding(tokenizer):
    from ragkv.bundled import load

    model, _ = load()
    encoder, rng = Encoder(tokenizer), random.Random(4)
    context = write_context(rng, SHAPE)
    asked = questions(rng, context)[:6]
    ids = encoder.prefix + [token for text in context.chunks for token in encoder.chunk(text)]
    with torch.no_grad():
        results = right(model, encoder, prefill(model, ids), asked)
        for question, good in zip(asked, results, strict=True):
            prompt = ids + encoder.question(question.text)
            out = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :].tolist()
            assert good == (out == [*encoder.ids(question.answer), encoder.eos])


def test_evaluate_counts_every_kind(tokenizer, size):
    torch.manual_seed(0)
    llama = to_llama(Reader(size).state_dict(), size, tokenizer)
    shape = Shape(documents=(4, 5), chunks=(1, 2), words=(6, 14))
    results = evaluate(llama, tokenizer, shape, 2, seed=0, names=HELDOUT_NAMES, arms=("full", "none"))
    assert all(n >= 2 for row in results.values() for _, n in row.values())


def test_where_order_fails_is_looked_up(tokenizer):
    """Tokens between first mentions, and a third name with the later one's head; counted into a table."""
    ann, bob, bea = (Entity(name, "person", "she") for name in ("Annas Fendale", "Novmar Holley", "Novvia Ashstad"))
    context = Context(
        ["Novvia Ashstad met Annas Fendale.", "Novmar Holley met Annas Fendale."], [0, 1], [ann, bob, bea], []
    )
    encoder = Encoder(tokenizer)
    question = lambda a, b: Question(f"Which is mentioned first, {b.name} or {a.name}?", a.name, "order")  # noqa: E731
    misled = order.described(question(ann, bob), context, encoder, good=False)
    plain = order.described(question(bea, ann), context, encoder, good=True)
    wrapper = len(encoder.chunk(""))
    assert misled == order.Asked(len(encoder.ids("Annas Fendale.")) + wrapper, True, False)
    assert plain == order.Asked(len(encoder.ids("Novvia Ashstad met")), False, True)
    rows = order.table([misled, plain]).splitlines()
    assert rows[2:4] == ["| 0 to 49 tokens apart | 2 | 50.0 |", "| 50 to 99 tokens apart | 0 | |"]
    assert rows[-3:] == [
        "| the later name's head stands before | 1 | 0.0 |",
        "| it does not | 1 | 100.0 |",
        "| all | 2 | 50.0 |",
    ]


def test_runs_are_ranked_side_by_side(tokenizer, size, tmp_path):
    """Two runs, the same cases and arms; a run that went on is evaluated anew."""
    plan = EvaluationPlan(
        "tiny", "a few", generated_cases(0, 3, 2), parse_arms(["full-prefill", "reuse@document"], [0.1]), timed=0
    )
    summaries = {}
    for name in ("one", "two"):
        run = TrainingRun(tmp_path / name, size, Plan(), (STAGE,), "cpu", seed=len(summaries))
        run.save()
        summaries[name] = summary_of(run.folder, plan)
    rows = [line.split(" | ") for line in ranking_table(summaries).splitlines()[2:]]
    assert {row[0] for row in rows} == {"| `full-prefill`", "| `reuse@document`"}
    assert all(len(row) == 3 and "%" in row[1] and "%" in row[2] for row in rows)
    TrainingRun(tmp_path / "one", size, Plan(), (STAGE,), "cpu", seed=7).train(tokenizer, compiled=False)
    summary_of(tmp_path / "one", plan)
    assert len(list((tmp_path / "one").glob("ranking-*"))) == 2


def test_curves_are_drawn(tmp_path):
    from training.curves import draw

    (tmp_path / "log.csv").write_text(
        "step,seconds,tokens,answer,read,subject,evidence\n20,1,50,3,2,2,1\n40,2,90,1,1,1,1\n"
    )
    assert draw(tmp_path).read_text(encoding="utf-8").count("<svg") == 1
