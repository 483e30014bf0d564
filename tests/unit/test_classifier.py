"""Laws of taught classifiers: they agree with their teacher on what they have not seen, and survive the disk."""

from __future__ import annotations

import json
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from glmctl.data import classifier, teacher
from glmctl.data.asked import Asked
from glmctl.data.classifier import Classifier, teach
from glmctl.data.sources import Document
from glmctl.data.words import hashes, words
from glmctl.errors import DataError, EnvironmentProblem, RecipeError
from glmctl.recipe.curation import EndpointTeacher, Heuristic, LabelsTeacher

SCIENCE = ["theorem", "proof", "equation", "energy", "integral", "molecule", "velocity", "probability"]
SHOP = ["cart", "sale", "discount", "shipping", "coupon", "login", "newsletter", "price"]
COMMON = [f"word{i}" for i in range(300)]


def corpus(count: int, seed: int) -> tuple[list[str], list[float]]:
    rng = random.Random(seed)
    texts, shares = [], []
    for _ in range(count):
        share = rng.random()
        special = [rng.choice(SCIENCE if rng.random() < share else SHOP) for _ in range(12)]
        texts.append(" ".join(rng.sample(special + rng.choices(COMMON, k=40), 52)))
        shares.append(sum(word in SCIENCE for word in special) / 12)
    return texts, shares


def taught() -> tuple[Classifier, dict[str, float]]:
    texts, scores = corpus(400, seed=0)
    return teach(hashes([words(text) for text in texts]), scores, 0.5)


def test_a_classifier_agrees_with_its_teacher_on_unseen_documents() -> None:
    found, report = taught()
    texts, scores = corpus(200, seed=1)
    given = [found.score(one) for one in hashes([words(text) for text in texts])]
    right = np.mean([(a >= 0.5) == (b >= 0.5) for a, b in zip(given, scores, strict=True)])
    assert right > 0.9
    assert report["accuracy"] > 0.85 > report["baseline"] + 0.1
    assert report["spearman"] > 0.8
    assert report["held_out"] == 80
    assert found.score(np.zeros(0, np.uint64)) == 0.0


def test_a_stored_classifier_scores_the_same_and_its_bytes_are_reproducible(tmp_path: Path) -> None:
    found, _ = taught()
    for name in ("a.npz", "b.npz"):
        found.save(tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    (some,) = hashes([words("proof of the sale")])
    assert Classifier.load(tmp_path / "a.npz").score(some) == found.score(some)


def test_damaged_and_foreign_classifiers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.npz"
    taught()[0].save(path)
    data = path.read_bytes()
    with pytest.raises(RecipeError, match=r"d\.npz: no such classifier"):
        Classifier.load(tmp_path / "d.npz")
    for bad in (b"", data[: len(data) // 2], b"hello", data[:200] + bytes(8) + data[208:]):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"c\.npz"):
            Classifier.load(path)
    np.savez(path, weights=np.array([{}], object), bias=0.0, probe=0)
    with pytest.raises(DataError, match=r"c\.npz"):
        Classifier.load(path)
    path.write_bytes(data)
    monkeypatch.setattr(classifier, "probe", lambda: 1)
    with pytest.raises(DataError, match="hashes words differently"):
        Classifier.load(path)


def test_a_teacher_that_sees_one_kind_only_is_an_error() -> None:
    texts, _ = corpus(20, seed=0)
    with pytest.raises(DataError, match="20 of 20 documents"):
        teach(hashes([words(text) for text in texts]), [1.0] * 20, 0.5)


def test_labels_bring_their_texts_and_bad_ones_name_their_line(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text('{"text": "a", "score": 1}\n{"text": "b", "score": 0.25}\n')
    assert teacher.rate(LabelsTeacher(paths=[str(path)]), [], Asked()) == (["a", "b"], [1.0, 0.25])
    path.write_text('{"text": "a", "score": 1}\n{"text": "b", "score": 2}\n')
    with pytest.raises(DataError, match=r"l\.jsonl:2"):
        teacher.rate(LabelsTeacher(paths=[str(path)]), [], Asked())


def test_a_heuristic_teaches() -> None:
    sample = [Document("theorem proof equation integral " * 20, "d", "p"), Document("cat sat mat hat " * 20, "d", "p")]
    texts, scores = teacher.rate(Heuristic(what="math"), sample, Asked())
    assert texts == [document.text for document in sample]
    assert scores[0] > 0.9 > 0.1 > scores[1]


LESSONS = {
    "en": ("because example theory experiment evidence", "cell membrane orbit glacier enzyme magnet", "of the in and"),
    "zh": ("因为 例如 原理 研究 结果", "细胞 轨道 冰川 酶 磁铁 光合", "的 是 在"),
}
OFFERS = {
    "en": ("buy cart price discount shipping", "sneakers sofa handbag jacket phone perfume", "of the in and"),
    "zh": ("购买 点击 优惠 广告 登录", "球鞋 沙发 手提包 外套 手机 香水", "的 是 在"),
}
"""by language: words that the educational heuristic knows, words that it does not, and words of neither kind"""


@pytest.mark.parametrize("language", ["en", "zh"])
def test_an_educational_classifier_ranks_held_out_pages_whose_words_its_teacher_does_not_know(language: str) -> None:
    rng = random.Random(0)

    def page(pools: tuple[str, str, str], known: bool) -> str:
        told, topic, plain = (pool.split() for pool in pools)
        special = rng.choices(told, k=15 if known else 0)
        found = [*special, *rng.choices(topic, k=30), *rng.choices(plain, k=60)]
        return " ".join(rng.sample(found, len(found)))

    kinds = (LESSONS[language], OFFERS[language])
    sample = [Document(page(kinds[i % 2], True), "d", str(i)) for i in range(201)]
    texts, scores = teacher.rate(Heuristic(what="educational"), sample, Asked())
    found, report = teach(hashes([words(text) for text in texts]), scores, 0.5)
    assert report["positive"] == pytest.approx(0.5, abs=0.05)
    unseen = [[page(kind, False) for _ in range(30)] for kind in kinds]
    _, teachers = teacher.rate(
        Heuristic(what="educational"), [Document(text, "d", "") for part in unseen for text in part], Asked()
    )
    assert max(teachers) == 0, "to the teacher they are all alike"
    lessons, offers = ([found.score(one) for one in hashes([words(text) for text in part])] for part in unseen)
    assert np.mean([a > b for a in lessons for b in offers]) > 0.95


@pytest.mark.parametrize(
    ("reply", "score"), [("4", 0.8), ("Score: 2.5/5", 0.5), ("0", 0.0), ("none", None), ("9", None), ("-1", None)]
)
def test_the_first_number_of_a_reply_is_its_score(reply: str, score: float | None) -> None:
    assert teacher.parse_score(reply, 5.0) == score


def test_any_openai_compatible_endpoint_can_teach_and_embed() -> None:
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path.endswith("/embeddings"):
                rows = [
                    {"object": "embedding", "index": i, "embedding": [len(t), 1]} for i, t in enumerate(body["input"])
                ]
                answer = {
                    "object": "list",
                    "data": rows,
                    "model": "m",
                    "usage": {"prompt_tokens": 0, "total_tokens": 0},
                }
            else:
                text = body["messages"][0]["content"]
                seen.append(text)
                message = {
                    "role": "assistant",
                    "content": "5" if "proof" in text else "maybe" if "odd" in text else "1",
                }
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                answer = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        base = f"http://127.0.0.1:{server.server_address[1]}/v1"
        asked = EndpointTeacher(base_url=base, model="m", prompt="Rate: {text}", max_chars=10)
        texts = ["a proof", *["nothing"] * 18, "odd"]
        kept, scores = teacher.rate(asked, [Document(text, "d", "p") for text in texts], Asked())
        assert kept == texts[:-1]
        assert scores == [1.0, *[0.2] * 18]
        assert sorted(seen)[0] == "Rate: a proof"
        with pytest.raises(DataError, match="1 of 2 replies"):
            teacher.ask(asked, ["odd", "proof"], Asked())
        assert teacher.embed(base, "m", ["ab", "abc"], Asked()) == [[2, 1], [3, 1]]
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(EnvironmentProblem, match="does not answer"):
        teacher.embed(base, "m", ["ab"], Asked())
