"""A language model as judge, asked as the paper asked it: how close is the answer to the right one, from 0 to 1?

Any server with the OpenAI chat format will do (`judge.url`). A request that fails for a moment is repeated after longer
and longer waits by the client; a reply is kept on the disk and never asked for again.
"""

import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vpt.config.evaluation import JudgeConfig
from vpt.errors import ConfigError, require
from vpt.evaluation.metrics.base import Metric
from vpt.evaluation.predictions import Prediction
from vpt.evaluation.statistics import Ratio

PROMPT = """\
Compare a model's answer to a question with the standard answer. Give it points from 0 to 1: the closer its meaning \
is to that of the standard answer, the more points. 1: they say the same. 0: they have nothing in common.

Question: {question}
Standard answer: {target}
Model's answer: {answer}

Reply with one line: score: <score>"""
_SCORE = re.compile(r"score[*_\"'`\s]*[:=][*_\"'`<\s]*(\d*\.?\d+)", re.IGNORECASE)  # marked up as chat models do


def read_score(reply: str) -> float | None:
    """The score in a reply; None where there is none between 0 and 1."""
    match = _SCORE.search(reply)
    return float(match[1]) if match and float(match[1]) <= 1 else None


class Judge(Metric):
    """The mean score of the first questions of a data set (`judge`) and the share of replies without a score, which do
    not count (`judge_unscored`).
    """

    def __init__(self, config: JudgeConfig) -> None:
        """Raises ConfigError without the package openai."""
        self.config, self._openai = config, require("openai", "judge", "a judge")
        self._client = self._openai.OpenAI(
            base_url=config.url, api_key=os.environ.get(config.api_key_env) or "none", max_retries=config.retries,
            timeout=config.timeout,
        )  # fmt: skip

    def measure(self, items: Sequence[Prediction]) -> dict[str, Ratio]:
        judged = items[: self.config.questions]
        rest: list[None] = [None] * (len(items) - len(judged))
        scores = [read_score(reply) for reply in self._replies([self._request(item) for item in judged])]
        unscored = [float(score is None) for score in scores]
        return {"judge": Ratio.mean([*scores, *rest]), "judge_unscored": Ratio.mean([*unscored, *rest])}

    def _request(self, item: Prediction) -> dict[str, Any]:
        text = PROMPT.format(question=item.question, target=item.target, answer=item.answer)
        return {
            "model": self.config.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": 64,
        }

    def _replies(self, requests: Sequence[dict[str, Any]]) -> list[str]:
        """A reply to every request. Raises ConfigError where the server gives none; what it gave before is kept."""
        with closing(_Cache(Path(self.config.cache), str(self.config.url))) as cache:
            known = {cache.key(request): cache.get(request) for request in requests}
            waiting = list({cache.key(r): r for r in requests if known[cache.key(r)] is None}.values())
            for request, reply in tqdm(
                self._ask(waiting), total=len(waiting), desc="judging", unit="answer", disable=not waiting
            ):
                cache.put(request, reply)
                known[cache.key(request)] = reply
            return [known[cache.key(request)] or "" for request in requests]

    def _ask(self, requests: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
        with ThreadPoolExecutor(self.config.workers) as pool:
            try:
                yield from pool.map(lambda request: (request, self._ask_one(request)), requests)
            except self._openai.OpenAIError as error:
                pool.shutdown(cancel_futures=True)
                raise ConfigError(
                    f"judge.url={self.config.url} gives no reply ({type(error).__name__}: {error}); the replies so far "
                    "are kept, type the same command to go on"
                ) from None

    def _ask_one(self, request: dict[str, Any]) -> str:
        return self._client.chat.completions.create(**request).choices[0].message.content or ""


class _Cache:
    """Replies by request, in one SQLite file, so that several processes may share it."""

    def __init__(self, path: Path, server: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._server, self._table = server, sqlite3.connect(path, timeout=60)
        self._table.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, request TEXT, reply TEXT)")

    def key(self, request: dict[str, Any]) -> str:
        return hashlib.sha256(f"{self._server}\n{json.dumps(request, sort_keys=True)}".encode()).hexdigest()

    def get(self, request: dict[str, Any]) -> str | None:
        row = self._table.execute("SELECT reply FROM replies WHERE key = ?", (self.key(request),)).fetchone()
        return None if row is None else row[0]

    def put(self, request: dict[str, Any], reply: str) -> None:
        with self._table:
            self._table.execute(
                "INSERT OR REPLACE INTO replies VALUES (?, ?, ?)", (self.key(request), json.dumps(request), reply)
            )

    def close(self) -> None:
        self._table.close()
