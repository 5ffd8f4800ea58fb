"""The endpoint answers the official client as `vpt ask` answers, alone and among others."""

import base64
import io
import json
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from openai import BadRequestError, InternalServerError, RateLimitError
from PIL import Image

from conftest import compose_config
from helpers.served import ask, client, data_url, idle, question, serving, shown
from vpt.cli.serve import listen, url_of
from vpt.data.records import REGION_PROMPT
from vpt.generation.answer_images import answer_images
from vpt.generation.generator import Generator
from vpt.generation.kv_cache import KVCache
from vpt.generation.row_state import GenerationLimits
from vpt.generation.running_batch import RunningBatch
from vpt.generation.sampling import Sampling
from vpt.serving import rows as rows_module
from vpt.serving import service as service_module
from vpt.serving.engine import Engine
from vpt.serving.examples import example_images
from vpt.serving.replies import ReplyWriter
from vpt.serving.rows import Prompt, held_back
from vpt.serving.settings import ServeConfig
from vpt.utils.text import until

TEXT = "what is the red shape?"
WAYS = [
    {"action": "free"}, {"action": "none"}, {"action": "region", "crop_margin": 1}, {"action": "dino"},
    {"action": "sam", "max_actions": 1}, {"action": "clip"},
]  # fmt: skip


@pytest.fixture(scope="module")
def service(all_parts):
    """A small step, so that every prompt comes in several parts."""
    with serving(all_parts, prefill_tokens=24, max_rows=12, max_queue=40) as running:
        yield running


@pytest.fixture(scope="module")
def images(folder):
    return [folder.root / f"{number}.png" for number in range(4)]


def told(pieces):
    """The text of a stream, its steps and its last piece."""
    pieces = list(pieces)
    choices = [choice for piece in pieces for choice in piece.choices]
    text = "".join(choice.delta.content or "" for choice in choices)
    steps = [choice.delta.vpt["step"] for choice in choices if (getattr(choice.delta, "vpt", None) or {}).get("step")]
    return text, steps, choices[-1]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way["action"])
def test_answers_are_those_of_ask(service, all_parts, images, way):
    reply = all_parts.ask(images[3], TEXT, max_new_tokens=20, **way)
    whole = ask(service, images[3], TEXT, max_tokens=20, **way)
    (choice,) = whole.choices
    assert choice.message.content == reply.answer.text
    assert choice.finish_reason == ("stop" if reply.answer.complete else "length")
    trace = choice.message.vpt["trace"]
    assert [(s["kind"], s["requested"], s["status"], s["visual_tokens"]) for s in trace] == [
        (s.kind, s.requested, s.status, s.visual_tokens) for s in reply.trace
    ]
    assert [tuple(s["box"]) if s["box"] else None for s in trace] == [s.box for s in reply.trace]
    assert choice.message.vpt["confidence"] == pytest.approx(reply.answer.confidence, rel=1e-3)
    text, steps, last = told(ask(service, images[3], TEXT, max_tokens=20, stream=True, **way))
    assert text.endswith(reply.answer.text) and last.delta.vpt["answer"] == reply.answer.text
    assert [step["requested"] for step in steps] == [step.requested for step in reply.trace]
    usage = whole.usage
    assert usage.completion_tokens == len(reply.answer.ids)
    details = usage.completion_tokens_details.model_extra
    assert details["perceived_tokens"] == sum(step.visual_tokens for step in reply.trace)
    assert 0 < usage.prompt_tokens_details.image_tokens < usage.prompt_tokens


def test_answers_are_the_same_among_others(service, all_parts, images):
    """Sixteen that look again in different ways join and leave meanwhile."""
    asked = [(images[i % 4], f"what is number {i}?", WAYS[i % len(WAYS)], 8 + i % 5) for i in range(17)]
    want = [all_parts.ask(image, text, max_new_tokens=most, **way).answer.text for image, text, way, most in asked]
    with ThreadPoolExecutor(17) as pool:
        got = pool.map(lambda one: ask(service, one[0], one[1], max_tokens=one[3], **one[2]), asked)
        assert [reply.choices[0].message.content for reply in got] == want
    assert idle(service)


def test_several_images_and_turns(service, all_parts, images):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "look"}, shown(images[1]), shown(images[0])]},
        {"role": "assistant", "content": "two shapes"},
        {"role": "user", "content": [shown(images[2]), {"type": "text", "text": "and this?"}]},
    ]
    wanted = service.parse(json.dumps({"messages": messages}).encode())
    record, media = service.reader.read(wanted.messages, "")
    assert [message.content for message in record.messages] == [
        "Be brief.", "<image><image>\nlook", "two shapes", "<image>\nand this?",
    ]  # fmt: skip
    sample = all_parts.processor.encode_prompt(record, media, turns=2)
    parts = (all_parts.model, all_parts.processor, all_parts.tokenizer.decode)
    (answer,) = Generator(*parts, GenerationLimits(12)).generate([sample], [media])
    assert ask(service, None, messages, max_tokens=12).choices[0].message.content == answer.text


def test_a_prompt_in_parts_is_a_prompt(all_parts, folder, images, service):
    """Any size of the parts gives the hidden state that the whole prompt gives."""
    wanted = service.parse(json.dumps({"messages": question(images[2], TEXT)}).encode())
    record, media = service.reader.read(wanted.messages, "")
    sample, model = all_parts.processor.encode_prompt(record, media), all_parts.model
    states = []
    with torch.inference_mode():
        for size in (7, 10_000):
            prompt = Prompt(sample)
            while prompt.images_left:
                service.engine._encode_images([type("row", (), {"prompt": prompt})])
            batch = service.engine._empty_batch()
            (row,) = Generator(model, all_parts.processor, str, GenerationLimits(9)).start([sample], [media])
            batch.join([row])
            parts = prompt.inputs(model, size)
            assert max(len(part.ids) for part in parts) <= size
            for part in parts:
                row.next_input = part
                (output,) = batch.step()
            states.append(output[-1])
            assert batch.cache.lengths == [len(sample.ids)]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


def test_rows_join_a_cache_and_leave_room(all_parts):
    like = torch.zeros(1)
    cache = KVCache.empty(2, 1, 4, like=like)
    batch = RunningBatch(all_parts.model, all_parts.processor.position_scheme, [], cache)
    batch.join([object(), object()])
    cache.reserve([40, 3])
    for layer in (0, 1):
        cache.update(torch.ones(1, 1, 43, 4), torch.ones(1, 1, 43, 4), layer)
    cache.commit([40, 3])
    assert cache.layers[0][0].shape == (2, 1, 40, 4)
    batch.select([False, True])
    assert cache.lengths == [3] and cache.layers[1][0].shape == (1, 1, 6, 4)


def test_drawn_answers(service, all_parts, images):
    """The choices of n=4 draw as the rows of one batch do; a seed makes them come again."""
    settings = {"temperature": 1.3, "top_p": 0.9, "seed": 5, "max_tokens": 10, "action": "none"}
    replies = [ask(service, images[0], TEXT, n=4, **settings) for _ in range(2)]
    texts = [[choice.message.content for choice in reply.choices] for reply in replies]
    assert texts[0] == texts[1] and len({*texts[0]}) > 1
    wanted = service.parse(json.dumps({"messages": question(images[0], TEXT)}).encode())
    record, media = service.reader.read(wanted.messages, "")
    sample, parts = all_parts.processor.encode_prompt(record, media), (all_parts.model, all_parts.processor)
    decode = lambda ids: all_parts.tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    generator = Generator(*parts, decode, GenerationLimits(10, action="none"), Sampling(1.3, top_p=0.9, seed=5))
    assert texts[0] == [answer.text for answer in generator.generate([sample] * 4, [media] * 4)]
    unseeded = {
        ask(service, images[0], TEXT, temperature=2.0, max_tokens=10).choices[0].message.content for _ in "1234"
    }
    assert len(unseeded) > 1


def test_stops(service, all_parts, images):
    text = all_parts.ask(images[0], TEXT, max_new_tokens=20, action="none").answer.text
    stop = text[len(text) // 2 : len(text) // 2 + 4]
    whole = ask(service, images[0], TEXT, max_tokens=20, action="none", stop=["never seen", stop])
    assert whole.choices[0].message.content == text.split(stop)[0].strip()
    assert whole.choices[0].finish_reason == "stop" and whole.usage.completion_tokens < 20
    pieces = ask(service, images[0], TEXT, max_tokens=20, action="none", stop=stop, stream=True)
    assert told(pieces)[0] == whole.choices[0].message.content


def test_parts_of_a_stop_wait():
    assert held_back("abc en", "end") == 2 and held_back("abc", "end") == 0 and held_back("end", "end") == 0
    assert until(" a b. c ", ["x", ". "]) == "a b" and until(" a ", []) == until(" a ", [""]) == "a"


def test_logprobs(service, images):
    whole = ask(service, images[0], TEXT, max_tokens=9, action="none", logprobs=True, top_logprobs=3)
    (choice,) = whole.choices
    content = choice.logprobs.content
    assert sum(entry.logprob for entry in content) == pytest.approx(
        math.log(choice.message.vpt["confidence"]), rel=1e-3
    )
    assert all(entry.top_logprobs[0].token == entry.token and len(entry.top_logprobs) == 3 for entry in content)
    pieces = ask(service, images[0], TEXT, max_tokens=9, action="none", logprobs=True, top_logprobs=3, stream=True)
    found = [entry for piece in pieces for c in piece.choices if c.logprobs for entry in c.logprobs.content]
    assert [entry.logprob for entry in found] == pytest.approx([entry.logprob for entry in content], rel=1e-3)


def test_bytes_of_a_character_in_parts_are_not_told(all_parts):
    """Tokens of a byte-level vocabulary may be parts of a character; together they are one."""
    tokens = all_parts.tokenizer.encode("\u00fc\U0001f600")
    writer = ReplyWriter("tiny", None, all_parts.tokenizer.decode)
    told = [writer._logprob(token, -1.0) for token in tokens]
    assert len(tokens) > 2 and all(one["bytes"] is None and one["token"] for one in told)
    assert writer._logprob(all_parts.tokenizer.encode("a")[0], -1.0) == {"token": "a", "logprob": -1.0, "bytes": [97]}


@pytest.mark.parametrize(("host", "url"), [("127.0.0.1", r"http://127\.0\.0\.1:\d+"), ("::1", r"http://\[::1\]:\d+")])
def test_where_it_listens_is_a_url(host, url):
    with listen(ServeConfig(checkpoint="x", host=host, port=0)) as listening:
        assert re.fullmatch(url, url_of(listening)) and httpx.URL(url_of(listening)).port > 0


@pytest.mark.parametrize("action", ["region", "dino"])
def test_pictures_are_those_of_a_reply(service, all_parts, images, action):
    """As they come: the regions so far, and what the step showed; the last one has all regions."""
    reply = all_parts.ask(images[3], TEXT, max_new_tokens=24, action=action)
    whole, *shown = answer_images(reply.question.image, reply.trace, reply.maps())
    got = ask(service, images[3], TEXT, max_tokens=24, action=action, pictures=True).choices[0].message.vpt["trace"]
    pairs = [step["pictures"] for step in got if step["status"] != "ignored"]
    sent = [pairs[-1][0], *(pair[1] for pair in pairs)]
    assert [one["caption"] for one in sent] == [one.caption for one in (whole, *shown)]
    for one, expected in zip(sent, (whole, *shown), strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(one["png"].partition("base64,")[2])))
        difference = np.asarray(image, dtype=int) - np.asarray(expected.image, dtype=int)
        assert np.abs(difference).max() <= 1  # a prompt in parts rounds f·c otherwise


def test_ablations(service, all_parts, images):
    plain = ask(service, images[3], TEXT, max_tokens=8, action="dino").choices[0].message
    assert "pictures" not in plain.vpt["trace"][0] and plain.vpt["trace"][0]["note"].startswith("dino: control state")
    zeroed = ask(service, images[3], TEXT, max_tokens=8, action="dino", ablation="features_zeroed", logprobs=True)
    assert zeroed.choices[0].message.vpt["confidence"] != plain.vpt["confidence"]
    whole = ask(service, images[3], TEXT, max_tokens=12, action="region").choices[0].message.vpt["trace"][0]
    moved = ask(service, images[3], TEXT, max_tokens=12, action="region", ablation="region_random")
    assert moved.choices[0].message.vpt["trace"][0]["requested"] == whole["requested"]
    assert moved.choices[0].message.vpt["trace"][0]["box"] != whole["box"]


def test_an_aborted_stream_frees_its_row(service, images):
    for _ in range(5):
        stream = ask(service, images[0], TEXT, max_tokens=1000, stream=True, temperature=1.0)
        next(iter(stream))
        stream.close()
    with pytest.raises(Exception, match="timed out"):
        client(service).with_options(timeout=0.3).chat.completions.create(
            model="tiny", messages=question(images[0], TEXT), max_tokens=1000, temperature=1.0, n=4
        )
    assert idle(service)


def test_a_full_queue_answers_429(all_parts, images):
    with serving(all_parts, max_rows=1, max_queue=1) as small:
        streams = [ask(small, images[0], TEXT, max_tokens=1000, stream=True, action="none") for _ in range(2)]
        with pytest.raises(RateLimitError, match="try again"):
            ask(small, images[0], TEXT)
        for stream in streams:
            stream.close()
        assert idle(small)
        with pytest.raises(BadRequestError, match="max_tokens=9999: at most 1024"):
            ask(small, images[0], TEXT, max_tokens=9999)
        assert idle(small) and ask(small, images[0], TEXT, max_tokens=2)


def test_draining_finishes_what_runs_and_refuses_the_rest(all_parts, images):
    with serving(all_parts, max_rows=1, max_queue=5, name="tiny") as ending, ThreadPoolExecutor(2) as pool:
        running = iter(ask(ending, images[0], TEXT, max_tokens=200, stream=True, action="none"))
        while not next(running).choices[0].delta.content:
            pass
        waits = pool.submit(ask, ending, images[0], TEXT)
        while not ending.engine.waiting:
            assert not waits.done()
        ending.engine.drain()
        assert httpx.get(f"{ending.url}/health").status_code == 503
        for refused in (waits.result, lambda: ask(ending, images[0], TEXT)):
            with pytest.raises(Exception, match="server is ending") as caught:
                refused()
            assert caught.value.status_code == 503
        assert told(running)[2].finish_reason in ("stop", "length")


@pytest.mark.parametrize(("owner", "method"), [(Engine, "_encode_images"), (RunningBatch, "step")])
def test_a_failed_step_is_told_and_the_next_one_served(service, all_parts, images, monkeypatch, owner, method):
    """Whether a prompt fails before it joins, or a step with it."""
    broken = ["once"]

    def failing(self, *given):
        if broken:
            raise RuntimeError(broken.pop())
        return own(self, *given)

    own = getattr(owner, method)
    monkeypatch.setattr(owner, method, failing)
    with pytest.raises(InternalServerError, match="could not be generated"):
        ask(service, images[0], TEXT, max_tokens=4)
    reply = ask(service, images[0], TEXT, max_tokens=4)
    assert reply.choices[0].message.content == all_parts.ask(images[0], TEXT, max_new_tokens=4).answer.text
    assert idle(service)


def test_a_request_that_takes_too_long_is_cut_off(all_parts, images, monkeypatch):
    """By a clock that ticks once a step: an answer with seconds for five steps has five tokens at any speed."""
    steps, step = [], RunningBatch.step
    monkeypatch.setattr(RunningBatch, "step", lambda self: (steps.append(1), step(self))[1])
    for module in (service_module, rows_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(len(steps)), time=time.time))
    with serving(all_parts, timeout=4.5) as hasty:
        reply = ask(hasty, images[0], TEXT, max_tokens=1024, temperature=1.5, seed=1, action="none")
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 5


def test_keys_and_pages(all_parts, images):
    with serving(all_parts, api_key="secret") as guarded:
        for key in ("wrong", "secre\u00e9"):
            reply = httpx.get(f"{guarded.url}/v1/models", headers={"Authorization": f"Bearer {key}".encode()})
            assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{guarded.url}/metrics").status_code == 401
        assert ask(guarded, images[0], TEXT, max_tokens=2, key="secret").choices
        assert client(guarded, "secret").models.retrieve("tiny").id == "tiny"
        page = httpx.get(guarded.url)
        assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
        assert httpx.get(f"{guarded.url}/examples/0.png").headers["content-type"] == "image/png"
        metrics = httpx.get(f"{guarded.url}/metrics", headers={"Authorization": "Bearer secret"}).text
        assert "vpt_answers_total" in metrics and 'vpt_tokens_total{kind="said"} 2.0' in metrics


def test_another_site_cannot_ask(service, images):
    body = {"messages": question(images[0], TEXT)}
    url = f"{service.url}/v1/chat/completions"
    assert httpx.post(url, json=body, headers={"Host": "evil.example"}).status_code == 403
    assert httpx.post(url, content=json.dumps(body), headers={"Content-Type": "text/plain"}).status_code == 415
    assert "access-control-allow-origin" not in httpx.options(url, headers={"Origin": "http://evil.example"}).headers
    assert data_url(images[0]).startswith("data:image/png")


def test_examples_are_what_the_model_knows(tmp_path):
    """Test questions of data that come with the package, one of each type; of one's own data, none."""
    found = example_images(compose_config("data=scenes_small", "encoder=[]", "data.actions={none:0,region:1}"))
    sizes = [Image.open(io.BytesIO(one.png)).size for one in found]
    assert {one.question.split()[0] for one in found} == {"Which", "What"} and all(width > 300 for width, _ in sizes)
    assert not any(one.question.endswith(REGION_PROMPT) for one in found)
    taught = ("data=scenes_small", "encoder=[]", "data.actions={none:0,region:1}", "data.action_prompt=true")
    asking = [one.question for one in example_images(compose_config(*taught)) if one.question.endswith(REGION_PROMPT)]
    assert asking and "<image>" not in asking[0]
    drawn = example_images()
    assert len(drawn) == 3 and example_images(compose_config(f"data.root={tmp_path}")) == drawn
