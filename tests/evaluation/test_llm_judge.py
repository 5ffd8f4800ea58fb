"""The judge, asked through the real client over a real socket."""

import threading

import pytest

from helpers.judge_server import Server
from vpt.config.evaluation import JudgeConfig
from vpt.errors import ConfigError
from vpt.evaluation.metrics.llm_judge import Judge, read_score
from vpt.evaluation.predictions import Prediction


@pytest.fixture
def serve():
    """Start a server; it ends with the test."""
    running = []

    def start(*arguments, **options):
        server = Server(*arguments, **options)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


ITEMS = [Prediction(f"r{n}", "Which animal?", "a dog", answer, False) for n, answer in enumerate(["dog", "cat", "fox"])]
REPLIES = {"dog": "score: 1", "cat": "Score: **0.25**, for it is an animal", "fox": "I cannot tell."}


def judge_of(server, tmp_path, **options):
    return Judge(JudgeConfig(url=server.url, model="stub", cache=str(tmp_path / "cache" / "judge.sqlite"), **options))


def test_it_is_asked_as_in_the_paper_and_nothing_twice(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_KEY", "secret")
    server = serve(REPLIES)
    found = judge_of(server, tmp_path, api_key_env="STUB_KEY").measure([*ITEMS, ITEMS[0]])
    assert found["judge"].value == pytest.approx((1 + 0.25 + 1) / 3)  # what has no score does not count
    assert found["judge_unscored"].value == 1 / 4 and found["judge"].questions == 3
    assert len(server.requests) == 3
    for path, headers, body in server.requests:
        assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("stub", 0, 64)
        assert "Which animal?" in body["messages"][0]["content"] and "a dog" in body["messages"][0]["content"]
    again = judge_of(server, tmp_path).measure(ITEMS)
    assert len(server.requests) == 3 and again["judge"].value == pytest.approx(1.25 / 2)


def test_the_first_questions_only(serve, tmp_path):
    server = serve(REPLIES)
    found = judge_of(server, tmp_path, questions=2).measure(ITEMS)
    assert len(server.requests) == 2 and len(found["judge"].numerator) == 3 and found["judge"].questions == 2


def test_what_fails_for_a_moment_is_asked_again(serve, tmp_path):
    server = serve(REPLIES, failures=[429, 503, 500])
    assert judge_of(server, tmp_path, workers=1).measure(ITEMS)["judge"].questions == 2
    assert len(server.requests) == 3 + 3


def test_a_server_that_stays_away_leaves_what_it_said_before(serve, tmp_path):
    server = serve(REPLIES, failures=[200, 401])
    with pytest.raises(ConfigError, match=r"gives no reply \(AuthenticationError.*type the same command to go on"):
        judge_of(server, tmp_path, workers=1).measure(ITEMS[:2])
    assert judge_of(server, tmp_path, workers=1).measure(ITEMS[:2])["judge"].value == pytest.approx(1.25 / 2)
    assert len(server.requests) == 3  # the first of them was not repeated


@pytest.mark.parametrize(("reply", "score"), [
    ("score: 0.7", 0.7), ("Score:1", 1.0), ("score: 1.0", 1.0), ("score: .5", 0.5), ("score: 0", 0.0),
    ("score: <0.8>", 0.8), ("**Score**: 0.8", 0.8), ("**Score:** 0.8", 0.8), ("score: **0.8**", 0.8), ("`score: 0.8`", 0.8),
    ('{"score": 0.8}', 0.8), ("score: <score>\nScore: <1>", 1.0), ("__Score__ = 0.8", 0.8), ("score: -0.8", None),
    ("score: 7", None), ("score: 10", None), ("score: 1.5", None), ("0.7", None), ("", None),
])  # fmt: skip
def test_scores_in_replies(reply, score):
    assert read_score(reply) == score
