"""Answers that share a batch, joined and left at any time, and the thread that writes them."""

import threading
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest

from affectgpt_jax import asking, load_run
from affectgpt_jax.data.pipeline import DataError, feature_shapes
from affectgpt_jax.inference import Answer
from affectgpt_jax.live import Busy, Engine, Failed, LiveAnswers, OutOfTime, Stopped
from affectgpt_jax.models import generate
from affectgpt_jax.models.generate import Sampling

QUESTIONS = ("description", "ovlabel")
# A model of two steps says the same about every clip, unless it is made to wander.
WANDER = Sampling(1.5, 0.95, 1.1)
# As many as there are devices, over which rows are split.
ROWS = 8


@pytest.fixture(scope="module")
def run(trained_run):
    return load_run(trained_run)


@pytest.fixture(scope="module")
def clips(run):
    return asking.open_clips(run, None)


@pytest.fixture(scope="module")
def generator(run, clips):
    settings = dict(max_new_tokens=None, batch_size=ROWS, sampling=WANDER, seed=3)
    return asking.make_generator(run, clips, **settings)


@pytest.fixture(scope="module")
def live(run, clips, generator):
    shapes = feature_shapes(run.processor.features, [clips])
    live = LiveAnswers(generator, run.trainable, rows=ROWS, lengths=(48, 64), shapes=shapes)
    live.warm_up()
    return live


@pytest.fixture(scope="module")
def expected(run, clips, generator):
    """Answers by clip and question, as `predict` has them."""
    return {
        (entry.name, question): answer
        for question in QUESTIONS
        for entry, answer in zip(
            clips.index, generator.answer(run.trainable, clips, question).each, strict=True
        )
    }


def finish(live, pieces):
    """Write until all answers are complete; `pieces` gets their texts by number."""
    complete = {}
    while len(complete) < len(pieces):
        for number, answer, done in live.write():
            pieces[number].append(answer.text)
            if done:
                complete[number] = answer
    return complete


def same(found, expected):
    # Log-probabilities in float32, from programs of other shapes.
    assert found.log_prob == pytest.approx(expected.log_prob, abs=1e-4)
    return (found.text, found.tokens, found.cut) == (expected.text, expected.tokens, expected.cut)


class Heard(list):
    """What an engine tells about an answer, and a way to wait for its end."""

    def __init__(self):
        self._end = threading.Event()

    def __call__(self, update):
        self.append(update)
        if isinstance(update, Exception) or update.complete:
            self._end.set()

    def last(self):
        assert self._end.wait(600)
        return self[-1]


def programs():
    compiled = (generate.prefill, generate.insert, generate.decode, generate._stopped)
    return [program._cache_size() for program in compiled]


def test_many_questions_at_once_are_answered_as_predict_does_in_fewer_steps(live, clips, expected):
    asked = [(record, question) for record in clips for question in QUESTIONS]
    assert len({answer.text for answer in expected.values()}) > 10, "alike, they prove little"
    before = programs()
    engine = Engine(live, queue=len(asked), timeout_s=600)
    try:
        first = live.steps
        heard = [Heard() for _ in asked]
        for (record, question), tell in zip(asked, heard):
            engine.submit(live.prompt(record, question, seed=3), tell)
        for (record, question), tell in zip(asked, heard):
            assert same(tell.last().answer, expected[record.name, question])
        together = live.steps - first
        for record, question in asked[:5]:
            tell = Heard()
            engine.submit(live.prompt(record, question, seed=3), tell)
            assert same(tell.last().answer, expected[record.name, question])
        alone = (live.steps - first - together) / 5
    finally:
        engine.stop()
    # Of eight rows some wait between two looks at the queue, and at the end.
    assert together < len(asked) * alone / 2
    assert programs() == before, "something was compiled"


def test_a_late_question_joins_and_texts_only_grow(live, clips, expected):
    pieces = {1: [], 2: []}
    live.put([1], [live.prompt(clips[4], "description", seed=3)])
    [(number, answer, complete)] = live.write()
    assert number == 1 and not complete
    pieces[1].append(answer.text)
    live.put([2], [live.prompt(clips[7], "ovlabel", seed=3)])
    first = live.steps
    found = finish(live, pieces)
    assert live.steps - first < sum(answer.tokens for answer in found.values()) - 2
    assert same(found[1], expected[clips[4].name, "description"])
    assert same(found[2], expected[clips[7].name, "ovlabel"])
    for texts in pieces.values():
        assert all(after.startswith(text) for text, after in zip(texts, texts[1:]))


def test_after_an_error_short_and_long_prompts_are_answered_by_the_same_programs(
    live, clips, expected
):
    short = live.prompt(clips[4], "ovlabel", seed=3)
    words = "why "
    while len((long := live.prompt(clips[4], words + "?", seed=3)).example) <= live.lengths[0]:
        words += "why "
    assert len(short.example) <= live.lengths[0] < len(long.example) <= live.lengths[1]
    before = programs()
    live.reset()
    live.put([1], [short])
    live.put([2], [long])
    found = finish(live, {1: [], 2: []})
    assert same(found[1], expected[clips[4].name, "ovlabel"])
    assert programs() == before, "something was compiled"


def test_rows_of_answers_that_are_left_are_free_at_once(live, clips, expected):
    asked = [live.prompt(clip, "description", seed=3) for clip in clips]
    live.put(range(ROWS), asked[:ROWS])
    assert not live.free
    live.drop([0, 2])
    assert live.free == 2
    live.put([ROWS], asked[ROWS : ROWS + 1])
    found = finish(live, {number: [] for number in (1, *range(3, ROWS + 1))})
    for number, answer in found.items():
        assert same(answer, expected[clips[number].name, "description"])


def test_an_answer_has_as_many_tokens_as_are_asked_for_and_another_seed(live, clips, expected):
    whole = expected[clips[4].name, "description"]
    live.put([0], [live.prompt(clips[4], "description", 2, seed=3)])
    short = finish(live, {0: []})[0]
    assert short.tokens == 2 and short.cut and whole.text.startswith(short.text)
    others = [live.prompt(clip, "description", 100, seed=4) for clip in clips]
    live.put(range(ROWS), others[:ROWS])
    found = finish(live, {number: [] for number in range(ROWS)})
    assert any(a.text != expected[clips[i].name, "description"].text for i, a in found.items())


def test_what_cannot_be_asked_is_refused_before_it_waits(live, clips):
    with pytest.raises(DataError, match="tokens, over the limit of 64; shorten the question"):
        live.prompt(clips[0], "why " * 100)
    with pytest.raises(DataError, match="reserved text <FaceHere>"):
        live.prompt(clips[0], "what of <FaceHere>")
    narrow = {name: values[:, :3] for name, values in clips[0].features.items()}
    record = SimpleNamespace(**{**vars(clips[0]), "features": narrow})
    with pytest.raises(DataError, match="in the shape .*; this run reads"):
        live.prompt(record, "ovlabel")


# --- the thread -----------------------------------------------------------------------------------


class Rows:
    """Stands in for `LiveAnswers`: two rows, which write a letter when the test says so."""

    def __init__(self):
        self.texts, self.may_write, self.resets = {}, threading.Semaphore(0), 0
        self.broken = False

    @property
    def free(self):
        return 2 - len(self.texts)

    def put(self, numbers, prompts):
        assert len(prompts) <= self.free and len({prompt.seed for prompt in prompts}) == 1
        self.texts |= {number: ["", prompt.size] for number, prompt in zip(numbers, prompts)}

    def drop(self, numbers):
        for number in numbers:
            del self.texts[number]

    def write(self):
        assert self.may_write.acquire(timeout=300)
        if self.broken:
            self.broken = False
            raise ValueError("a device that failed")
        found = []
        for number, (text, size) in list(self.texts.items()):
            self.texts[number][0] = text = text + "x"
            found.append((number, Answer(text, len(text), False, None), len(text) == size))
            if len(text) == size:
                del self.texts[number]
        return found

    def reset(self):
        self.texts, self.resets = {}, self.resets + 1


@pytest.fixture
def engine():
    engine = Engine(Rows(), queue=3, timeout_s=600)
    yield engine
    engine.live.may_write.release(1000)
    engine.stop()


def submit(engine, size=1, seed=0):
    heard = Heard()
    heard.ticket = engine.submit(SimpleNamespace(size=size, seed=seed), heard)
    return heard


def wait(condition):
    for _ in range(30_000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen")


def test_who_comes_when_the_queue_is_full_is_told_so(engine):
    answered = [submit(engine, 3), submit(engine, 3)]
    wait(lambda: not engine.live.free)
    waiting = [submit(engine) for _ in range(3)]
    with pytest.raises(Busy, match="3 questions wait already, which is the limit; ask later"):
        submit(engine)
    engine.live.may_write.release(20)
    assert [heard.last().answer.text for heard in answered] == ["xxx", "xxx"]
    assert [len(heard) for heard in answered] == [3, 3]
    assert [heard.last().answer.text for heard in waiting] == ["x"] * 3


def test_what_nobody_waits_for_leaves_its_row_and_the_queue(engine):
    long = [submit(engine, 1000), submit(engine, 1000)]
    wait(lambda: not engine.live.free)
    unwanted, wanted = submit(engine), submit(engine, 2)
    for heard in (long[0], unwanted):
        engine.drop(heard.ticket)
    engine.live.may_write.release(10)
    assert wanted.last().answer.text == "xx"
    assert not unwanted


def test_an_answer_that_takes_too_long_ends_with_a_sentence():
    engine = Engine(Rows(), queue=3, timeout_s=0.2)
    try:
        heard = [submit(engine, 10**9) for _ in range(3)]
        threading.Event().wait(0.3)
        engine.live.may_write.release(5)
        for tell in heard:
            assert isinstance(tell.last(), OutOfTime)
            assert "not complete after 0.2 s, which is the limit" in str(tell.last())
    finally:
        engine.live.may_write.release(1000)
        engine.stop()


def test_what_a_request_has_spent_counts(engine):
    late = Heard()
    engine.submit(SimpleNamespace(size=3, seed=0), late, left_s=-1)
    assert isinstance(late.last(), OutOfTime)


def test_an_error_in_a_step_ends_what_was_answered_and_nothing_else(engine, capfd):
    engine.live.broken = True
    failed = [submit(engine, 3), submit(engine, 3)]
    wait(lambda: not engine.live.free)
    waiting = submit(engine, 2)
    engine.live.may_write.release(10)
    assert [type(heard.last()) for heard in failed] == [Failed] * 2
    assert waiting.last().answer.text == "xx" and engine.live.resets == 1
    assert capfd.readouterr().err.count("ValueError: a device that failed") == 1


def test_prompts_of_two_seeds_join_one_after_another(engine):
    heard = [submit(engine, 1, seed=seed) for seed in (0, 1, 1)]
    engine.live.may_write.release(10)
    assert [tell.last().answer.text for tell in heard] == ["x"] * 3


def test_at_its_end_all_are_told():
    engine = Engine(Rows(), queue=3, timeout_s=600)
    heard = deque([submit(engine, 10**9) for _ in range(3)])
    engine.begin_stop()
    engine.live.may_write.release(10)
    engine.stop()
    assert all(isinstance(tell.last(), Stopped) for tell in heard)
    with pytest.raises(Stopped):
        submit(engine)


def test_filler_rows_are_nobodys(live):
    """`warm_up` has put prompts of which none is in use."""
    assert live.free and not np.any(live._rows._owners >= 0)
