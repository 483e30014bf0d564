"""Laws of curation: counts add up, buckets get their epochs, and the shards depend on the inputs alone."""

from __future__ import annotations

import gzip
import json
import random
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from glmctl.data import mixture, passes, prepare, scores, spool, stats, units
from glmctl.data.reading import BadRows
from glmctl.data.shards import TokenShards
from glmctl.data.sources import documents, read
from glmctl.data.tokenizer import Tokenizer
from glmctl.data.way import Ways, render
from glmctl.data.words import words
from glmctl.errors import DataError, EnvironmentProblem, RecipeError
from glmctl.recipe.load import load
from glmctl.recipe.schema import DataRecipe, HuggingFaceSource, JsonLinesSource, ParquetSource, Source, TextSource
from glmctl.run import atomic

COMMON = [
    *("the", "of", "and", "to", "in", "is", "that", "for", "it", "was", "with", "as", "be", "by", "on"),
    *("are", "this", "have", "from", "not", "at", "which", "or", "an", "but"),
]
SUBJECT = [f"{a}{b}{c}" for a in "bcdfghklmnprst" for b in "aeiou" for c in ("ring", "tion", "ment", "ness", "ly")]


def prose(rng: random.Random, sentences: int = 12) -> str:
    def sentence() -> str:
        found = [rng.choice(COMMON) if rng.random() < 0.45 else rng.choice(SUBJECT) for _ in range(12)]
        return " ".join(found).capitalize() + "."

    return "\n".join(" ".join(sentence() for _ in range(3)) for _ in range(sentences // 3))


def noise(rng: random.Random) -> str:
    return " ".join(rng.choice(["click", "buy", "cart", "sale", *SUBJECT]) for _ in range(80))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """300 web pages: good ones, noisy ones, 20 exact and 20 near copies, 10 that are too short; and 40 of code."""
    folder = tmp_path_factory.mktemp("curation")
    tiny_tokenizer.save(folder / "tokenizer")
    rng = random.Random(0)
    good = [prose(rng) for _ in range(150)]
    web = [*good, *[noise(rng) for _ in range(100)], *good[:20]]
    web += [text.replace("The", "That", 1) + " One more." for text in good[20:40]]
    web += [f"Short {i}." for i in range(10)]
    rng.shuffle(web)
    (folder / "web.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in web))
    (folder / "code").mkdir()
    for i in range(40):
        body = f'def f{i}(a: int) -> int:\n    """Adds {i}."""\n    return a + {i}\n' * (1 + i % 4)
        (folder / "code" / f"m{i}.py").write_text(body if i % 2 else "x=1;y=2\n" * (i + 20))
    return folder


STAGES: list[dict[str, Any]] = [
    {"type": "web_rules", "domains": ["web"], "min_words": 20},
    {"type": "exact"},
    {"type": "minhash", "domains": ["web"]},
    {
        "type": "score",
        "name": "quality",
        "domains": ["web"],
        "scorer": {"type": "heuristic", "what": "web"},
        "cut_by": "quantile",
        "cuts": [0.2, 0.6, 0.9],
        "epochs": [0, 1, 1.5, 3.5],
    },
    {
        "type": "score",
        "name": "code",
        "domains": ["code"],
        "scorer": {"type": "heuristic", "what": "code"},
        "cut_by": "quantile",
        "within": "language",
        "cuts": [0.3, 0.7],
        "epochs": [0, 1, 2],
    },
]


def recipe(home: Path, **fields: Any) -> DataRecipe:
    sources = [
        {"type": "jsonl", "domain": "web", "paths": [str(home / "web.jsonl")]},
        {"type": "source_tree", "domain": "code", "root": str(home / "code")},
    ]
    body = {"name": "d", "tokenizer": str(home / "tokenizer"), "sources": sources, "stages": STAGES}
    return DataRecipe.model_validate({**body, "validation_fraction": 0.1, **fields})


def run(recipe: DataRecipe, out: Path) -> dict[str, Any]:
    return prepare.run(recipe, SimpleNamespace(export=out / "export"))  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def prepared(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared")
    run(recipe(home), out)
    return out


def report(out: Path) -> dict[str, Any]:
    return stats.read(out)


def test_every_document_is_accounted_for_by_stage_and_reason(prepared: Path) -> None:
    found = report(prepared)
    assert found["rows"] == [300, 40]
    rules, exact, near, quality, code = found["stages"]
    assert (rules["in"], rules["reasons"]) == (300, {"too few words": 10})
    assert (exact["in"], exact["out"]) == (330, 330 - exact["reasons"]["same text"])
    # 20 pages, and the files of the tree that hold the same lines under another name do not
    assert exact["reasons"] == {"same text": 20}
    assert (near["in"], near["reasons"]) == (270, {"near duplicate": 20})
    assert quality["in"] == near["out"] == 250
    assert code["in"] == 40
    for stage in found["stages"]:
        assert stage["in"] - stage["out"] == sum(stage["reasons"].values())
        if "buckets" in stage:
            assert sum(bucket["documents"] for bucket in stage["buckets"]) == stage["in"]
    assert not (prepared / "work").exists()


def test_buckets_get_their_epochs_the_lowest_none_and_the_top_its_target(prepared: Path) -> None:
    quality = report(prepared)["stages"][3]
    assert [bucket["documents"] for bucket in quality["buckets"]] == [50, 100, 75, 25]
    assert [bucket["epochs"] for bucket in quality["buckets"]] == [0, 1, 1.5, 3.5]
    means = [bucket["mean_score"] for bucket in quality["buckets"]]
    assert means == sorted(means)
    with np.load(prepared / "export" / prepare.DECISIONS) as arrays:
        epochs = arrays["epochs"][~np.isnan(arrays["score_quality"]) & (arrays["dropped_by"] < 0)]
    # the report's bar: the top bucket is seen more than 3.2 times
    assert dict(zip(*np.unique(epochs, return_counts=True), strict=True)) == {1.0: 100, 1.5: 75, 3.5: 25}
    shards = TokenShards.open(prepared)
    bounds = [*shards.document_starts.tolist(), shards.total_tokens]
    texts = [bytes(shards.tokens(a, b - a).astype("<u2")) for a, b in pairwise(bounds)]
    counts = np.unique(np.unique(np.array(texts, object), return_counts=True)[1])
    assert {1, 2, 3, 4} >= set(counts.tolist()) >= {1, 2, 3}


def test_the_same_bytes_at_any_number_of_workers_and_any_size_of_units(
    home: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 20_000)
    assert len(units.plan(recipe(home).sources)) > 8
    monkeypatch.setenv(passes.WORKERS_VARIABLE, "2")
    run(recipe(home), tmp_path / "two")
    monkeypatch.setenv(passes.WORKERS_VARIABLE, "1")
    run(recipe(home), tmp_path / "one")
    one, two = files(tmp_path / "one/export"), files(tmp_path / "two/export")
    assert one == two
    # units are how the work is cut, never what comes out
    whole = files(prepared / "export")
    assert {n: b for n, b in one.items() if n.startswith(("train", "val"))} == {
        n: b for n, b in whole.items() if n.startswith(("train", "val"))
    }


def test_tiers_within_a_language_are_those_of_every_language_that_rows_state(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    languages = ["kotlin", "c#", "python", "Lua", "?", "some language of our own", None]
    # each language's texts are longer than all of the one before
    rows = [{"text": f"{i} " + "x" * (40 * at), "lang": lang} for at, lang in enumerate(languages) for i in range(20)]
    random.Random(0).shuffle(rows)
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"type": "jsonl", "domain": "code", "paths": [str(tmp_path / "c.jsonl")], "code": True}
    longest = {**STAGES[-1], "scorer": {"type": "heuristic", "what": "length"}, "cuts": [0.4], "epochs": [0, 1]}
    made = recipe(home, sources=[{**source, "language_field": "lang"}], stages=[longest])
    monkeypatch.setattr(units, "UNIT_BYTES", 4000)
    assert len(units.plan(made.sources)) > 3
    for workers in ("1", "2"):
        monkeypatch.setenv(passes.WORKERS_VARIABLE, workers)
        run(made, tmp_path / workers)
    assert files(tmp_path / "1/export") == files(tmp_path / "2/export")
    with np.load(tmp_path / "1/export" / prepare.DECISIONS) as arrays:
        shown = arrays["epochs"] > 0
    kept = {lang: sum(shown[at] for at, row in enumerate(rows) if row["lang"] == lang) for lang in languages}
    assert kept == dict.fromkeys(languages, 12)


@pytest.mark.parametrize("where", ["scan", "measure", "encode"])
def test_a_kill_costs_the_unit_under_way_and_changes_nothing(
    home: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 60_000)
    module = {"scan": spool, "measure": prepare.curate, "encode": prepare.encode}[where]
    work, calls = getattr(module, where), []

    def killed(folder: Path, *arguments: Any) -> None:
        calls.append(folder)
        if len(calls) == 3:
            raise KeyboardInterrupt
        work(folder, *arguments)

    monkeypatch.setattr(module, where, killed)
    with pytest.raises(KeyboardInterrupt):
        run(recipe(home), tmp_path)
    assert not (tmp_path / "export").exists()
    total = len(units.plan(recipe(home).sources))
    run(recipe(home), tmp_path)
    assert len(calls) == total + 1  # the one that was cut short is done twice
    again = files(tmp_path / "export")
    assert again["train/tokens-00000.bin"] == files(prepared / "export")["train/tokens-00000.bin"]


def test_damaged_work_is_done_again_and_other_work_is_not_used(home: Path, tmp_path: Path, prepared: Path) -> None:
    planned = units.plan(recipe(home).sources)
    arguments = [(unit, recipe(home).sources[unit.source], [], 0.01) for unit in planned]

    def damaged() -> None:
        with passes.opened(tmp_path / "work", "key", planned) as opened:
            folders = opened.run("scan", spool.scan, lambda number: arguments[number])
            whole = files(folders[0])
            (folders[0] / spool.DOCUMENTS).write_bytes(b"{")
            assert files(opened.run("scan", spool.scan, lambda number: arguments[number])[0]) == whole
            raise RuntimeError

    with pytest.raises(RuntimeError):
        damaged()
    assert (tmp_path / "work/key").is_dir()
    with passes.opened(tmp_path / "work", "other", planned):
        assert not (tmp_path / "work/key").exists()
    assert not (tmp_path / "work").exists()


def test_provenance_rebuilds_the_same_bytes(home: Path, prepared: Path, tmp_path: Path) -> None:
    said = json.loads((prepared / "export" / prepare.PROVENANCE).read_text())
    (web,) = said["sources"][0]["files"]
    assert web["sha256"] == atomic.sha256_file(home / "web.jsonl")
    assert len(said["sources"][1]["files"]) == 40
    assert sum(said["mixture"].values()) == pytest.approx(1.0)
    run(DataRecipe.model_validate(said["recipe"]), tmp_path)
    assert files(tmp_path / "export") == files(prepared / "export")


def test_a_document_can_be_followed_through_every_stage(home: Path, prepared: Path) -> None:
    ways = Ways(recipe(home), prepared / "export")
    (short,) = ways.find("Short 3.", 5)
    assert [(step.stage, step.verdict) for step in short.steps] == [("web_rules", "dropped")]
    assert short.steps[0].why == "too few words: 2 words, 20 to 100000 wanted"
    assert short.shown == 0
    near = list(ways.find(" One more.", 30))
    assert len(near) == 20
    pairs = [way.steps[2] for way in near]
    assert all(step.stage == "minhash" for step in pairs)
    dropped = [step for step in pairs if step.verdict == "dropped"]
    assert dropped
    assert all("web.jsonl:" in step.why for step in dropped)
    (code,) = ways.find("m7.py", 1)
    assert [step.verdict for step in code.steps[:3]] == ["not asked", "kept", "not asked"]
    assert "score" in code.steps[-2].why
    assert code.steps[-1].stage == "context"
    assert "minhash" in render(near[:2])
    total = sum(way.shown for way in ways.find("", 1000))
    found = report(prepared)
    assert total == sum(
        split["web"] + found["repositories"][name]["code"]["files"]
        for name, split in found["documents_by_domain"].items()
    )


def test_changed_sources_are_noticed(home: Path, prepared: Path, tmp_path: Path) -> None:
    other = recipe(home, sources=[{"type": "jsonl", "domain": "web", "paths": [str(home / "web.jsonl")]}], stages=[])
    with pytest.raises(DataError, match="the sources have changed"):
        Ways(other, prepared / "export")
    with pytest.raises(DataError, match="only a finished"):
        Ways(other, tmp_path)


def test_sources_and_labels_of_the_same_size_are_noticed_too(home: Path, tmp_path: Path) -> None:
    rows = [{"text": f"Page number {i} is a {'good' if i % 2 else 'poor'} one."} for i in range(40)]
    data, labels = tmp_path / "rows.jsonl", tmp_path / "labels.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels.write_text("".join(json.dumps({**row, "score": i % 2}) + "\n" for i, row in enumerate(rows)))
    taught = {"type": "taught", "teacher": {"type": "labels", "paths": [str(labels)]}}
    stage = {"type": "score", "name": "q", "scorer": taught, "cuts": [0.5], "epochs": [1, 2]}
    source = {"type": "jsonl", "domain": "web", "paths": [str(data)]}
    made = recipe(home, sources=[source], stages=[stage])
    run(made, tmp_path)
    (way,) = Ways(made, tmp_path / "export").find("number 7 ", 5)
    assert way.shown
    for path in (data, labels):
        text = path.read_text()
        path.write_text(text.replace("number 7 ", "number 8 "))
        with pytest.raises(DataError, match=rf"{path.name}: the sources have changed since"):
            Ways(made, tmp_path / "export")
        path.write_text(text)
    list(Ways(made, tmp_path / "export").find("number 7 ", 5))
    (tmp_path / "export" / prepare.PROVENANCE).write_text("{}")
    with pytest.raises(DataError, match=r"provenance\.json: damaged"):
        Ways(made, tmp_path / "export")


def test_statistics_add_up(prepared: Path) -> None:
    found = stats.summary(report(prepared))
    assert sum(domain["share"] for domain in found["domains"].values()) == pytest.approx(1.0)
    shards = [TokenShards.open(prepared, split) for split in ("train", "validation")]
    assert sum(d["tokens_train"] for d in found["domains"].values()) == shards[0].total_tokens
    assert sum(found["lengths"].values()) == sum(len(split.document_starts) for split in shards)
    assert found["duplicates"] == {"exact": 20, "minhash": 20}
    assert found["dropped"]["quality: bucket 1 of 4"] == 50


def test_a_mixture_gives_every_domain_its_share(home: Path, tmp_path: Path) -> None:
    run(recipe(home, mixture={"web": 0.7, "code": 0.3}, stages=STAGES[1:3]), tmp_path)
    shares = {name: found["share"] for name, found in stats.summary(report(tmp_path))["domains"].items()}
    # 40 documents of code of very unequal lengths are shown a whole number of times each
    assert shares["code"] == pytest.approx(0.3, abs=0.03)
    with pytest.raises(DataError, match=r"mixture\.code: this share means .* epochs"):
        run(recipe(home, mixture={"web": 0.01, "code": 0.99}, stages=[]), tmp_path / "b")


def test_a_mixture_counts_the_templates_tokens_of_a_conversation(home: Path, tmp_path: Path) -> None:
    # the turns' marks are one token each, and a dozen each where they are read as text
    talk = {"messages": [{"role": role, "content": "ok"} for role in ("user", "assistant") * 8]}
    lines = [
        json.dumps({**talk, "messages": [{"role": "system", "content": str(i)}, *talk["messages"]]}) for i in range(120)
    ]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines))
    sources = [
        {"type": "conversations", "domain": "agent", "paths": [str(tmp_path / "talks.jsonl")]},
        {"type": "jsonl", "domain": "web", "paths": [str(home / "web.jsonl")]},
    ]
    made = recipe(home, sources=sources, stages=[], mixture={"agent": 1, "web": 9}, max_epochs=50)
    run(made, tmp_path)
    shares = {name: found["share"] for name, found in stats.summary(report(tmp_path))["domains"].items()}
    assert shares["agent"] == pytest.approx(0.1, abs=0.02)


def test_shares_that_cannot_be_had_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    mixture.warn_of_misses({"a": 3, "b": 1}, {"a": 760, "b": 240})
    mixture.warn_of_misses({}, {"a": 760, "b": 240})
    assert capsys.readouterr().err == ""
    mixture.warn_of_misses({"a": 3, "b": 1, "c": 1}, {"a": 600, "b": 400})
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "b 40.0% instead of 20.0%, c 0.0% instead of 20.0%" in said


def test_mixture_factors_by_hand() -> None:
    assert mixture.factors({"a": 3, "b": 1}, {"a": 100.0, "b": 100.0}) == {"a": 1.5, "b": 0.5}


def test_a_taught_classifier_travels_with_the_data(home: Path, tmp_path: Path) -> None:
    taught = {
        "type": "score",
        "name": "reads-well",
        "domains": ["web"],
        "scorer": {"type": "taught", "teacher": {"type": "heuristic", "what": "web"}, "sample": 200},
        "cuts": [0.5],
        "epochs": [0, 2],
    }
    run(recipe(home, stages=[taught]), tmp_path / "a")
    (stage,) = report(tmp_path / "a")["stages"]
    assert stage["accuracy"] > 0.9 > stage["baseline"]
    low, high = stage["buckets"]
    assert low["mean_score"] < 0.5 < high["mean_score"]
    stored = {**taught, "scorer": {"type": "classifier", "path": str(tmp_path / "a/export/classifiers/reads-well.npz")}}
    run(recipe(home, stages=[stored]), tmp_path / "b")
    one, two = files(tmp_path / "a/export"), files(tmp_path / "b/export")
    assert one["train/tokens-00000.bin"] == two["train/tokens-00000.bin"]


def test_a_heuristic_does_not_teach_in_a_language_that_it_has_no_words_of(home: Path, tmp_path: Path) -> None:
    pages = [
        f"Клетка номер {i} состоит из ядра и мембраны, потому что так устроена жизнь. Например, теория говорит об этом."
        for i in range(50)
    ]
    (tmp_path / "ru.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in [*pages, "It is the end."])
    )
    taught = {"type": "taught", "teacher": {"type": "heuristic", "what": "educational"}, "sample": 60}
    stage = {"type": "score", "name": "lessons", "scorer": taught, "cuts": [0.5], "epochs": [1, 2]}
    source = {"type": "jsonl", "domain": "russian", "paths": [str(tmp_path / "ru.jsonl")]}
    with pytest.raises(DataError, match=r"'lessons'.*'educational'.*50 of 51.*russian.*ru\.jsonl") as caught:
        run(recipe(home, sources=[source], stages=[stage]), tmp_path)
    assert "endpoint" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("what", "text", "read"),
    [
        ("educational", "Der Hund ist in dem Haus und die Katze liegt vor der Tür, weil es regnet.", False),
        ("educational", "El perro duerme en la casa porque llueve y no quiere salir a pasear con los demás.", False),
        ("educational", "De hond is in het huis, want het is aan het regenen of zo. Dat was al te verwachten.", False),
        ("educational", "The dog sleeps in the house because it rains.", True),
        ("educational", "植物的光合作用是在叶绿体中进行的，因为那里有光。", True),
        ("educational", "theory evidence experiment", True),
        ("math", "Пусть x = 2 и y = 3, тогда x + y = 5.", True),
        ("math", "Пусть будет так.", False),
        ("code", "Пусть будет так.", True),
    ],
)
def test_which_texts_a_heuristic_has_words_of(what: str, text: str, read: bool) -> None:
    assert scores.reads(what, text, words(text)) is read


def test_semantic_duplicates_are_a_stage(home: Path, tmp_path: Path) -> None:
    rng = random.Random(5)

    def slot() -> str:
        return "".join(rng.choices("abcdefghijklmnop", k=7))

    pages = [
        f"best {slot()} shops in {slot()} town call {slot()} now for {slot()} offers by {slot()} " for _ in range(40)
    ]
    rows = [*pages, *[prose(rng) for _ in range(60)]]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    source = {"type": "jsonl", "domain": "web", "paths": [str(tmp_path / "t.jsonl")]}
    run(recipe(home, sources=[source], stages=[{"type": "minhash"}, {"type": "semantic"}]), tmp_path / "out")
    minhash, semantic = report(tmp_path / "out")["stages"]
    assert minhash["reasons"] == {}
    assert semantic["reasons"] == {"semantic duplicate": 39}


def test_conversations_that_share_their_tools_are_no_near_duplicates(home: Path, tmp_path: Path) -> None:
    tools = [
        {"type": "function", "function": {"name": f"tool_{i}", "description": "does one thing or another " * 8}}
        for i in range(6)
    ]
    talks = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": str(i)}], "tools": tools}
        for i in range(30)
    ]
    lines = [json.dumps(talk) + "\n" for talk in talks]
    (tmp_path / "talks.jsonl").write_text("".join([*lines, lines[0]]))
    sources = [
        {"type": "conversations", "domain": "agent", "paths": [str(tmp_path / "talks.jsonl")]},
        {"type": "jsonl", "domain": "web", "paths": [str(home / "web.jsonl")]},
    ]
    longest = {**STAGES[3], "domains": None, "scorer": {"type": "heuristic", "what": "length"}}
    made = recipe(home, sources=sources, stages=[{"type": "minhash"}, {"type": "semantic"}, longest, {"type": "exact"}])
    run(made, tmp_path)
    found = report(tmp_path)
    assert [stage["in"] for stage in found["stages"][:3]] == [300, *[stage["out"] for stage in found["stages"][:2]]]
    assert found["stages"][3]["reasons"] == {"same text": 1}
    shown = found["documents_by_domain"]
    assert shown["train"]["agent"] + shown["validation"].get("agent", 0) == 30
    (way, *_) = Ways(made, tmp_path / "export").find("29?", 1)
    assert [step.verdict for step in way.steps] == ["not asked", "not asked", "not asked", "kept"]


# ------------------------------------------------------------------ sources and recipes


def texts(source: Source) -> list[str]:
    return [document.text for document in documents([source], 0)]


def test_rows_are_the_same_from_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"text": f"text {i} ü", "lang": "python"} for i in range(700)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "r.jsonl").write_bytes(lines)
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(lines))
    half = lines.index(b"\n", len(lines) // 2) + 1
    frames = [zstandard.compress(lines[:half]), zstandard.compress(lines[half:])]
    (tmp_path / "r.jsonl.zst").write_bytes(b"".join(frames))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet", row_group_size=100)
    wanted = [row["text"] for row in rows]
    for name in ("r.jsonl", "r.jsonl.gz", "r.jsonl.zst"):
        assert texts(JsonLinesSource(domain="d", paths=[str(tmp_path / name)])) == wanted
    parquet = ParquetSource(domain="d", paths=[str(tmp_path / "r.parquet")], code=True, language_field="lang")
    found = list(documents([parquet], 0))
    assert [document.text for document in found] == wanted
    assert {(document.is_code, document.language) for document in found} == {(True, "python")}
    assert found[250].path.endswith("r.parquet:251")
    with pytest.raises(DataError, match="no column 'txt'; one of: text, lang"):
        texts(parquet.model_copy(update={"field": "txt"}))


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_truncated_zst_names_the_file(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "r.jsonl.zst"
    path.write_bytes(zstandard.compress(b"".join(b'{"text": "row %d"}\n' % (i * i) for i in range(500)))[:-cut])
    with pytest.raises(DataError, match=r"r\.jsonl\.zst: truncated or damaged"):
        texts(JsonLinesSource(domain="d", paths=[str(path)]))


def test_a_zst_bomb_is_stopped_and_a_damaged_parquet_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl.zst"
    path.write_bytes(zstandard.compress((b" " * 999_999 + b"\n") * 20))
    with pytest.raises(DataError, match="unpacks to more than 200 times"):
        texts(JsonLinesSource(domain="d", paths=[str(path)]))
    (tmp_path / "r.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"r\.parquet"):
        texts(ParquetSource(domain="d", paths=[str(tmp_path / "r.parquet")]))


def test_units_cover_every_line_once_wherever_they_are_cut(tmp_path: Path) -> None:
    rng = random.Random(0)
    lines = [json.dumps({"text": "x" * rng.randrange(1, 200) + str(i)}) for i in range(300)]
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(lines))  # the last line has no end
    source = JsonLinesSource(domain="d", paths=[str(path)])
    whole = [(document.text, document.path) for document in documents([source], 0)]
    for size in (50, 333, 4000, 10**6):
        planned = units.plan([source], size)
        found = [(d.text, d.path) for unit in planned for d in read(unit, source, BadRows())]
        assert found == whole
        assert sum(unit.size for unit in planned) == path.stat().st_size


def test_a_huge_text_file_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glmctl.data.sources.MAX_BLOCK_BYTES", 1000)
    path = tmp_path / "t.txt"
    path.write_text("".join(f"line {i} ü\n" for i in range(500)))
    found = texts(TextSource(domain="d", paths=[str(path)]))
    assert len(found) > 3
    assert "".join(found) == path.read_text()


def test_without_a_network_a_hub_source_is_an_environment_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.load_dataset", _unreachable)
    with pytest.raises(EnvironmentProblem, match="hub does not give it"):
        texts(HuggingFaceSource(domain="d", dataset="nobody/nothing"))


class Hub:
    """A hub whose data set moves on with every request for its commit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        self.opened: list[Any] = []
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: self)
        monkeypatch.setattr("datasets.load_dataset", self.load)
        self.columns = {"lang": "en"}

    def dataset_info(self, dataset: str, *, revision: str | None = None) -> Any:
        self.asked.append((dataset, revision))
        return SimpleNamespace(sha=f"{len(self.asked):040x}")

    def load(self, dataset: str, config: str | None, *, revision: str, **_: Any) -> list[dict[str, str]]:
        self.opened.append(revision)
        return [{"text": f"Row {i} of {dataset} at {revision}.", **self.columns} for i in range(60)]


def test_a_run_reads_the_hub_at_the_commit_it_began_with(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch)
    pinned = "f" * 40
    sources = [
        {"type": "huggingface", "domain": "web", "dataset": "a/b"},
        {"type": "huggingface", "domain": "web", "dataset": "c/d", "revision": pinned},
    ]
    made = recipe(home, sources=sources, stages=[])
    monkeypatch.setattr(prepare.encode, "encode", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path)
    monkeypatch.undo()
    again = Hub(monkeypatch)
    run(made, tmp_path)
    assert (hub.asked, again.asked, again.opened) == ([("a/b", None)], [], [])
    assert hub.opened == [f"{1:040x}", pinned]
    said = json.loads((tmp_path / "export" / prepare.PROVENANCE).read_text())
    assert [source["files"][0]["path"] for source in said["sources"]] == [
        f"hf://datasets/a/b@{1:040x}",
        f"hf://datasets/c/d@{pinned}",
    ]
    # the manifest's recipe gives the same bytes after the data set has moved on, and so does looking into the run
    run(DataRecipe.model_validate(said["recipe"]), tmp_path / "rebuilt")
    one, two = (files(out / "export") for out in (tmp_path, tmp_path / "rebuilt"))
    assert one["train/tokens-00000.bin"] == two["train/tokens-00000.bin"]
    (way,) = Ways(made, tmp_path / "export").find("Row 7 of a/b", 5)
    assert way.shown == 1
    assert again.asked == []
    # a new run begins with what is there now
    run(made, tmp_path / "new")
    assert files(tmp_path / "new/export")["train/tokens-00000.bin"] == one["train/tokens-00000.bin"]
    again.asked.append("another commit")
    run(made, tmp_path / "newer")
    assert files(tmp_path / "newer/export")["train/tokens-00000.bin"] != one["train/tokens-00000.bin"]


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_hub_that_does_not_answer_and_a_damaged_record_are_named(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(home, sources=[{"type": "huggingface", "domain": "web", "dataset": "a/b"}], stages=[])
    hub = Hub(monkeypatch)
    monkeypatch.setattr(hub, "dataset_info", _unreachable)
    with pytest.raises(EnvironmentProblem, match=r"a/b: the Hugging Face hub does not give it"):
        run(made, tmp_path)
    for text in ("{", "[]", '{"a/b@main": "main"}', '{"a/b@main": 5}'):
        (tmp_path / "commits.json").write_text(text)
        with pytest.raises(DataError, match=r"commits\.json: damaged"):
            run(made, tmp_path)


def test_what_is_hidden_in_a_folder_is_no_data(tmp_path: Path) -> None:
    names = [
        "a.txt",
        ".hidden.txt",
        ".git/HEAD",
        ".cache/huggingface/download/a.txt.metadata",
        "b/.git/x.txt",
        "b/c.txt",
    ]
    root = tmp_path / ".data"  # the folder itself may be a hidden one
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    assert texts(TextSource(domain="d", paths=[str(root)])) == ["a.txt", "b/c.txt"]


def test_a_language_field_that_no_row_has_is_an_error(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"x = {i}", "lang": "python"} if i == 77 else {"text": f"x = {i}"} for i in range(100)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"type": "jsonl", "domain": "code", "paths": [str(tmp_path / "c.jsonl")], "code": True}
    monkeypatch.setattr(units, "UNIT_BYTES", 500)
    run(recipe(home, sources=[{**source, "language_field": "lang"}], stages=[]), tmp_path)
    with pytest.raises(DataError, match=r"0\.language_field: no row of .*c\.jsonl has a language in 'language'.*text"):
        run(recipe(home, sources=[{**source, "language_field": "language"}], stages=[]), tmp_path / "b")
    Hub(monkeypatch)
    hub = HuggingFaceSource(domain="d", dataset="a/b", language_field="language")
    with pytest.raises(DataError, match=r"a/b: no column 'language'; one of: text, lang"):
        texts(hub)


def _unreachable(*_: Any, **__: Any) -> Any:
    raise ConnectionError("Couldn't reach the Hub")


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("[{type: exact, domains: [wep]}]", "did you mean 'web'"),
        ("[{type: exact}, {type: web_rules}]", "put it before 'exact'"),
        ("[{type: minhsh}]", "minhash"),
        ("[{type: minhash, domains: [chat]}]", "'chat' holds conversations, which pass 'minhash' untouched"),
        (
            "[{type: score, name: q, scorer: {type: heuristic, what: web}, cuts: [0.5], epochs: [1]}]",
            "1 cuts make 2 buckets",
        ),
        (
            "[{type: score, name: q, scorer: {type: heuristic, what: web}, cuts: [0.5, 0.1], epochs: [1, 1, 1]}]",
            "cuts must rise",
        ),
    ],
)
def test_a_wrong_stage_is_a_recipe_error(tmp_path: Path, stages: str, said: str) -> None:
    path = tmp_path / "r.yaml"
    source = "{type: text, domain: web, paths: [x]}, {type: conversations, domain: chat, paths: [x]}"
    path.write_text(f"type: data\ntokenizer: t\nsources: [{source}]\nstages: {stages}\n")
    with pytest.raises(RecipeError, match=said) as caught:
        load(str(path))
    assert "r.yaml" in caught.value.message
