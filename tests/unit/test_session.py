"""Generation on a real tiny engine: against transformers, alone and together, ends and cancellation."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from pipeline.errors import (
    CheckpointError,
    GateError,
    PipelineError,
    PlanError,
    RequestError,
    StageError,
)
from pipeline.network import BuildLimits
from pipeline.runtime.generation import FinishReason, TokenEvent
from pipeline.runtime.requests import GenerationRequest
from pipeline.runtime.sampling import SamplingOptions
from pipeline.runtime.scheduler import Scheduler
from pipeline.runtime.session import Session
from tests.triton.tiny_engine import build_tiny_engine

POISON = 3  # a token id
LIMITS = BuildLimits(max_batch_size=3, max_seq_len=128, max_input_len=64)
PROMPTS = ["The quick brown fox", "Grüße", "def add(left, right):\n    return left", "日本語"]


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_engine(tmp_path_factory.mktemp("tiny"), LIMITS)


@pytest.fixture
def session(engine_dir: Path) -> Session:
    return Session(engine_dir, prefill_chunk=5)


def _ids(events: Sequence[TokenEvent]) -> list[int]:
    return [event.token_id for event in events if event.token_id is not None]


def _text(events: Sequence[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def _run(session: Session, prompt: Any, **options: Any) -> list[TokenEvent]:
    return list(session.generate(GenerationRequest(prompt, **{"max_tokens": 20, **options})))


@pytest.fixture(scope="module")
def transformers_ids(engine_dir: Path) -> dict[str, list[int]]:
    """Greedy continuations by transformers, from the checkpoint that the engine was made of."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = engine_dir.parent / "source"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    continuations = {}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=0)
        continuations[prompt] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return continuations


@pytest.mark.parametrize("prefill_chunk", [1, 4, 256])
def test_greedy_tokens_are_those_of_transformers(
    engine_dir: Path, transformers_ids: dict[str, list[int]], prefill_chunk: int
) -> None:
    session = Session(engine_dir, prefill_chunk=prefill_chunk)
    for prompt, expected in transformers_ids.items():
        assert _ids(_run(session, prompt)) == expected


def test_together_as_alone(session: Session, transformers_ids: dict[str, list[int]]) -> None:
    """More requests than slots, of different lengths, started one after another."""
    requests = [
        (prompt, length) for length in (3, 20, 9) for prompt in PROMPTS
    ]  # twelve requests over three slots
    generations = []
    for prompt, length in requests:
        request = session.prepare(GenerationRequest(prompt, max_tokens=length))
        generations.append(session.submit(request))
        session.step()
    assert session.num_active == session.num_slots == 3
    assert session.num_waiting > 0
    while session.step():
        pass
    assert [generation.output_ids for generation in generations] == [
        transformers_ids[prompt][:length] for prompt, length in requests
    ]
    assert (session.num_active, session.num_waiting) == (0, 0)


def test_a_seed_repeats_in_any_company(session: Session) -> None:
    options = {"temperature": 1.0, "seed": 9, "max_tokens": 30}
    alone = _ids(_run(session, "The dog", **options))
    for number in range(2):
        noise = GenerationRequest(f"Noise {number}", max_tokens=100, temperature=1.5)
        session.submit(session.prepare(noise))
    session.step()
    assert _ids(_run(session, "The dog", **options)) == alone
    assert _ids(_run(session, "The dog", **{**options, "seed": 10})) != alone


def test_iterators_read_in_turns(session: Session, transformers_ids: dict[str, list[int]]) -> None:
    iterators = [
        session.generate(GenerationRequest(prompt, max_tokens=20)) for prompt in PROMPTS[:2]
    ]
    pairs = list(zip(*iterators, strict=True))
    for column, prompt in enumerate(PROMPTS[:2]):
        assert _ids([pair[column] for pair in pairs]) == transformers_ids[prompt]


def test_streams_go_on_while_a_long_prompt_is_read(session: Session) -> None:
    running = session.submit(session.prepare(GenerationRequest("The dog", max_tokens=60)))
    while not running.output_ids:
        session.step()
    before = len(running.output_ids)
    newcomer = session.submit(session.prepare(GenerationRequest((7,) * 64, max_tokens=5)))
    steps = 0
    while not newcomer.output_ids:
        session.step()
        steps += 1
    assert steps == 13  # 64 tokens in chunks of 5
    assert len(running.output_ids) == before + steps


def test_events(session: Session, transformers_ids: dict[str, list[int]]) -> None:
    prompt = PROMPTS[0]
    events = _run(session, prompt, max_tokens=6)
    assert _ids(events) == transformers_ids[prompt][:6]
    assert [event.num_output_tokens for event in events] == [1, 2, 3, 4, 5, 6]
    assert {event.num_input_tokens for event in events} == {len(session.tokenizer.encode(prompt))}
    assert [event.finish_reason for event in events] == [None] * 5 + [FinishReason.LENGTH]
    whole = session.tokenizer.decode([*session.tokenizer.encode(prompt), *_ids(events)])
    assert (prompt + _text(events)).rstrip("\ufffd") == whole.rstrip("\ufffd")


def test_one_token(session: Session, transformers_ids: dict[str, list[int]]) -> None:
    (event,) = _run(session, PROMPTS[0], max_tokens=1)
    assert event.token_id == transformers_ids[PROMPTS[0]][0]
    assert event.finish_reason is FinishReason.LENGTH


def test_a_full_cache(session: Session) -> None:
    events = _run(session, (7,) * 64, max_tokens=64, temperature=5.0, seed=1)
    assert events[-1].num_output_tokens == 64
    with pytest.raises(
        RequestError, match=r"64 prompt tokens \+ 65 = 129 are more than max_seq_len"
    ):
        _run(session, (7,) * 64, max_tokens=65)


def test_end_of_sequence(engine_dir: Path, tmp_path: Path, session: Session) -> None:
    """The id is a choice of the model's files: make one of the tokens it is about to say the end."""
    whole = _run(session, PROMPTS[0])
    end = next(index for index in range(5, 20) if _ids(whole).index(_ids(whole)[index]) == index)
    copy = Path(shutil.copytree(engine_dir, tmp_path / "engine"))
    (copy / "tokenizer" / "generation_config.json").write_text(
        f'{{"eos_token_id": [9999, {_ids(whole)[end]}]}}'
    )
    events = _run(Session(copy), PROMPTS[0])
    assert _ids(events) == _ids(whole)[: end + 1]
    assert events[-1].finish_reason is FinishReason.STOP
    assert events[-1].num_output_tokens == end + 1
    before = [*session.tokenizer.encode(PROMPTS[0]), *_ids(whole)[:end]]
    expected = session.tokenizer.decode(before).rstrip("\ufffd")
    assert PROMPTS[0] + _text(events) == expected  # without the text of the ending token


def test_a_stop_word_ends_it_and_frees_the_slot(session: Session) -> None:
    whole = _text(_run(session, PROMPTS[0]))
    word = whole[4:6]
    events = _run(session, PROMPTS[0], stop_words=("never!", word))
    assert _text(events) == whole[: whole.index(word)]
    assert events[-1].finish_reason is FinishReason.STOP
    assert len(events) < 20
    assert session.num_active == 0


def test_a_stop_word_that_never_comes_changes_nothing(session: Session) -> None:
    whole = _text(_run(session, PROMPTS[0]))
    assert _text(_run(session, PROMPTS[0], stop_words=(whole + "x", whole[-3:] + "y"))) == whole


def test_closing_an_iterator_cancels_and_frees_the_slot(session: Session) -> None:
    iterator = session.generate(GenerationRequest(PROMPTS[0], max_tokens=60))
    next(iterator)
    assert session.num_active == 1
    iterator.close()
    assert session.num_active == 0


def test_cancelling_while_running_and_while_waiting(session: Session) -> None:
    requests = [
        session.submit(session.prepare(GenerationRequest("The dog", max_tokens=60)))
        for _ in range(session.num_slots + 1)
    ]
    session.step()
    running, waiting = requests[0], requests[-1]
    assert (running.slot, waiting.slot) == (0, None)
    session.cancel(running)
    session.cancel(running)  # again does no harm
    session.step()
    assert waiting.slot == 0
    session.cancel(waiting)
    late = session.submit(session.prepare(GenerationRequest("Late", max_tokens=60)))
    session.cancel(late)
    assert session.num_waiting == 0
    assert [one.events[-1].finish_reason for one in (running, waiting, late)] == [
        FinishReason.CANCELLED
    ] * 3
    assert late.events[-1].num_output_tokens == 0
    assert session.num_active == 2


def test_nothing_to_do(session: Session) -> None:
    assert session.step() is False


def test_a_wrong_request_takes_no_slot(session: Session) -> None:
    with pytest.raises(RequestError, match="max_tokens: 0 is not positive"):
        _run(session, "x", max_tokens=0)
    assert (session.num_active, session.num_waiting) == (0, 0)


@pytest.mark.parametrize("num_slots", [0, 4])
def test_slots_the_engine_was_not_built_for(engine_dir: Path, num_slots: int) -> None:
    with pytest.raises(PlanError) as caught:
        Session(engine_dir, num_slots)
    assert str(caught.value) == (
        f"num_slots: {num_slots}; allowed: 1 to the engine's max_batch_size = 3; "
        "fix: ask for fewer slots, or build the engine with a larger max_batch_size"
    )


def test_an_engine_without_its_parts(engine_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(engine_dir, tmp_path / "engine"))
    (copy / "rank0.weights").unlink()
    with pytest.raises(GateError, match=r"rank0\.onnx: ONNX Runtime cannot load it"):
        Session(copy)
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: there is no such file"):
        Session(copy)


@pytest.fixture(scope="module")
def nan_engine(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same engine with NaN for every weight (0xffff is a float16 NaN)."""
    copy = Path(shutil.copytree(engine_dir, tmp_path_factory.mktemp("nan") / "engine"))
    weights = copy / "rank0.weights"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    return copy


def test_an_engine_that_computes_nonsense(nan_engine: Path) -> None:
    session = Session(nan_engine)
    with pytest.raises(StageError, match="engine: the largest logit is nan"):
        _run(session, "x")
    assert session.num_active == 0


@pytest.fixture(scope="module")
def poisoned_engine(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same engine, but the embedding of token POISON is NaN."""
    copy = Path(shutil.copytree(engine_dir, tmp_path_factory.mktemp("poison") / "engine"))
    graph = onnx.load(copy / "rank0.onnx", load_external_data=False).graph
    table = next(node.input[0] for node in graph.node if node.op_type == "Gather")
    (embedding,) = (one for one in graph.initializer if one.name == table)
    place = {entry.key: entry.value for entry in embedding.external_data}
    num_tokens, row_bytes = embedding.dims[0], int(place["length"]) // embedding.dims[0]
    assert num_tokens > POISON
    with (copy / "rank0.weights").open("r+b") as weights:
        weights.seek(int(place["offset"]) + POISON * row_bytes)
        weights.write(b"\xff" * row_bytes)
    return copy


def test_a_slot_is_usable_after_logits_that_were_not_finite(
    poisoned_engine: Path, transformers_ids: dict[str, list[int]]
) -> None:
    session = Session(poisoned_engine, num_slots=1)
    with pytest.raises(StageError, match="engine: the largest logit is nan"):
        _run(session, (7,) * 40 + (POISON,))
    assert _ids(_run(session, PROMPTS[0])) == transformers_ids[PROMPTS[0]]


def test_a_slot_is_usable_after_a_poisoned_prompt_was_cancelled(
    poisoned_engine: Path, transformers_ids: dict[str, list[int]]
) -> None:
    """Its logits were never looked at, so no error tells of the NaN in the cache."""
    session = Session(poisoned_engine, num_slots=1, prefill_chunk=32)
    generation = session.submit(session.prepare(GenerationRequest((POISON,) * 64, max_tokens=1)))
    session.step()
    assert not generation.is_prefilled
    session.cancel(generation)
    assert _ids(_run(session, PROMPTS[0])) == transformers_ids[PROMPTS[0]]


class Collector:
    """A sink that remembers; `broken` makes `send` or `fail` raise as a bug would."""

    def __init__(self, *, broken: str = "") -> None:
        self.events: list[TokenEvent] = []
        self.error: PipelineError | None = None
        self.cancelled = False
        self.done = threading.Event()
        self.first = threading.Event()
        self._broken = broken

    def is_cancelled(self) -> bool:
        return self.cancelled

    def send(self, event: TokenEvent) -> None:
        if self._broken == "send":
            raise RuntimeError("a bug in a sink")
        self.events.append(event)
        self.first.set()
        if event.finish_reason is not None:
            self.done.set()

    def fail(self, error: PipelineError) -> None:
        self.error = error
        self.done.set()
        if self._broken == "fail":
            raise RuntimeError("a bug in a sink")


def _submit(scheduler: Scheduler, session: Session, sink: Collector, max_tokens: int) -> None:
    scheduler.submit(session.prepare(GenerationRequest("The dog", max_tokens=max_tokens)), sink)


def test_the_scheduler_serves_cancels_and_stops(session: Session) -> None:
    scheduler = Scheduler(session)
    scheduler.start()
    short, left, stopped = Collector(), Collector(), Collector()
    for sink, max_tokens in ((short, 4), (left, 110), (stopped, 110)):
        _submit(scheduler, session, sink, max_tokens)
    assert left.first.wait(10)
    left.cancelled = True
    assert short.done.wait(10)
    assert left.done.wait(10)
    assert stopped.first.wait(10)
    scheduler.stop()
    assert stopped.done.is_set()
    assert len(_ids(short.events)) == 4
    assert left.events[-1].finish_reason in (FinishReason.CANCELLED, FinishReason.LENGTH)
    assert short.error is left.error is None
    with pytest.raises(StageError, match="scheduler: the server is stopping"):
        _submit(scheduler, session, Collector(), 1)


def test_the_scheduler_reports_an_engine_error_to_its_request(nan_engine: Path) -> None:
    session = Session(nan_engine)
    scheduler = Scheduler(session)
    scheduler.start()
    for _ in range(2):  # it goes on after the first
        sink = Collector()
        _submit(scheduler, session, sink, 4)
        assert sink.done.wait(10)
        assert "the largest logit is nan" in str(sink.error)
    scheduler.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_dead_scheduler(session: Session) -> None:
    scheduler = Scheduler(session)
    scheduler.start()
    bystander, culprit = Collector(), Collector(broken="send")
    _submit(scheduler, session, bystander, 110)
    _submit(scheduler, session, culprit, 4)
    for sink in (bystander, culprit):
        assert sink.done.wait(10)
        assert "scheduler: it died from an error" in str(sink.error)
    with pytest.raises(StageError, match="it died from an error; fix: see the server's log"):
        _submit(scheduler, session, Collector(), 1)
    scheduler.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_sink_that_cannot_fail_does_not_keep_the_others_waiting(session: Session) -> None:
    scheduler = Scheduler(session)
    sinks = [Collector(broken="fail"), Collector(), Collector(broken="fail"), Collector()]
    for sink in sinks:
        _submit(scheduler, session, sink, 60)
    scheduler.start()
    for sink in sinks[: session.num_slots]:
        assert sink.first.wait(10)
    scheduler.stop()
    assert all("the server is stopping" in str(sink.error) for sink in sinks)


def test_a_request_that_cannot_be_started_gets_its_last_call(
    session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    """`prepare` would refuse this seed: a request that got past it stands for any bug there."""
    scheduler = Scheduler(session)
    good = session.prepare(GenerationRequest("The dog", max_tokens=4))
    bad = replace(good, sampling=SamplingOptions(seed=-1))
    sinks = [Collector(), Collector(), Collector()]
    for request, sink in zip((good, bad, good), sinks, strict=True):
        scheduler.submit(request, sink)
    scheduler.start()
    for sink in sinks:
        assert sink.done.wait(10)
    assert str(sinks[1].error) == "scheduler: an unexpected error; fix: see the server's log"
    assert "ValueError" in caplog.text
    assert [len(_ids(sink.events)) for sink in sinks] == [4, 0, 4]
    scheduler.stop()
