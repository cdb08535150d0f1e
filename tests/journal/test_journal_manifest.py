"""The manifest: what is written is read back, other formats and damage are refused, differences in words."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frame_memory.journal import manifest as module
from frame_memory.journal.files import FileRecord, JournalError
from frame_memory.journal.manifest import (
    FORMAT,
    NAME,
    Manifest,
    SectionRecord,
    SegmentRecord,
    difference,
    encode,
    read_manifest,
    write_manifest,
)

ANY = st.text(st.characters(), max_size=8)  # lone surrogates too: a prompt may hold what the browser sent
WORDS = st.dictionaries(ANY, ANY, max_size=3)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=3), v, max_size=2),
    max_leaves=4,
)
FILES = st.builds(FileRecord, st.just("sections/000.safetensors"), st.integers(0), st.text("0123456789abcdef"))
RECORDS = st.builds(
    SectionRecord, st.integers(0, 9999), st.integers(), st.integers(), ANY, FILES, WORDS,
    st.dictionaries(ANY, st.floats(allow_nan=False), max_size=2), st.lists(ANY, max_size=2).map(tuple),
    st.floats(0, 1e9), ANY,
)  # fmt: skip
MANIFESTS = st.builds(
    Manifest, ANY, WORDS, WORDS, st.dictionaries(st.text(max_size=3), PLAIN, max_size=2), ANY,
    st.lists(RECORDS, max_size=3).map(lambda rs: {r.index: r for r in rs}), st.lists(RECORDS, max_size=2).map(tuple),
    st.lists(st.integers(0), max_size=3).map(tuple),
    st.dictionaries(ANY, st.dictionaries(st.text(max_size=3), PLAIN, max_size=2), max_size=2).map(
        lambda segments: {name: SegmentRecord(name, values) for name, values in segments.items()}
    ),
    st.none() | ANY,
)  # fmt: skip


def one(**changes):
    record = SectionRecord(0, 0, 9, "abc", FileRecord("sections/000.safetensors", 3, "ff"))
    return replace(Manifest("film", {"kind": "F1"}, {"prompt": "a cat"}, {}, "now", {0: record}), **changes)


@given(MANIFESTS)
def test_what_is_written_is_read_back(tmp_path, manifest):
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert list(tmp_path.iterdir()) == [tmp_path / NAME]


def test_it_is_strict_json_with_letters_of_any_language_as_they_are(tmp_path):
    record = replace(one().sections[0], measures={"worst": float("nan"), "best": float("-inf")})
    write_manifest(tmp_path, one(fields={"prompt": "猫 🎬"}, sections={0: record}))
    text = (tmp_path / NAME).read_text(encoding="utf-8")

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads(text, parse_constant=refuse)
    back = read_manifest(tmp_path).sections[0].measures
    assert "猫 🎬" in text and back["worst"] != back["worst"] and back["best"] == float("-inf")


@pytest.mark.parametrize("cut", range(0, len(encode(one())) - 1, 37))
def test_fault_03_a_cut_off_manifest_is_refused_and_left_alone(tmp_path, cut):
    data = encode(one())[:cut]
    (tmp_path / NAME).write_bytes(data)
    with pytest.raises(JournalError, match="is damaged.*Nothing was changed"):
        read_manifest(tmp_path)
    assert (tmp_path / NAME).read_bytes() == data


@pytest.mark.parametrize(
    "way, value",
    [(("sections",), []), (("sections", "0", "file"), None), (("sections", "0", "start"), "x"), (("takes",), 3),
     (("sections", "0", "index"), 1), (("shape",), None), (("sections", "0", "file", "name"), "../../x"),
     (("sections", "0", "file", "name"), "C:/x"), (("sections", "0", "file", "name"), "a\\..\\b"),
     (("sections", "0", "file", "name"), "/x"), (("sections", "0", "file", "name"), "")],
)  # fmt: skip
def test_a_manifest_that_is_json_but_no_manifest(tmp_path, way, value):
    data = json.loads(encode(one()))
    inner = data
    for name in way[:-1]:
        inner = inner[name]
    inner[way[-1]] = value
    (tmp_path / NAME).write_text(json.dumps(data))
    with pytest.raises(JournalError, match="is damaged"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "{}", "\udcff"])
def test_other_json_is_damage_too(tmp_path, text):
    (tmp_path / NAME).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(JournalError, match="is damaged"):
        read_manifest(tmp_path)


def test_fault_10_another_format_is_refused_with_both_versions(tmp_path):
    (tmp_path / NAME).write_text(json.dumps({"format": 7, "written_by": "Frame Memory journal 7", "new": {}}))
    with pytest.raises(JournalError, match=f"format 7, written by Frame Memory journal 7.*format {FORMAT}.*Update"):
        read_manifest(tmp_path)
    (tmp_path / NAME).write_text(json.dumps({"format": 0}))
    with pytest.raises(JournalError, match="an unknown version.*version that wrote it"):
        read_manifest(tmp_path)


def test_a_folder_without_one(tmp_path):
    with pytest.raises(JournalError, match="no project"):
        read_manifest(tmp_path)


def test_fault_10_the_difference_names_every_field():
    old = {"model": "F1 abc", "seed": "1", "lora": "film.safetensors", "same": "x"}
    new = {"model": "F1 def", "seed": "1", "sampler": "uni_pc", "same": "x"}
    assert difference(old, new).splitlines() == [
        "  lora: was 'film.safetensors', now not given",
        "  model: was 'F1 abc', now 'F1 def'",
        "  sampler: was not given, now 'uni_pc'",
    ]
    assert difference(old, dict(old)) == ""
    known, seeds = ({"seed": a, "start": b} for a, b in (("12345678", "0a1b2c3d"), ("87654321", "4e5f6a7b")))
    assert difference(known, seeds) == "  seed: was '12345678', now '87654321'\n  start: changed"


def test_fault_10_of_long_values_the_place_where_they_differ_is_shown():
    old, new = "a" * 200 + "CAT" + "b" * 200, "a" * 200 + "DOG" + "b" * 200
    text = difference({"prompt": old}, {"prompt": new})
    assert "CAT" in text and "DOG" in text and len(text) < 3 * module.SHOWN
    assert "'...'" not in difference({"p": "x" * 100}, {"p": "x" * 101})


@given(WORDS, WORDS)
def test_fault_10_no_difference_means_equal(old, new):
    assert (difference(old, new) == "") == (old == new)
    assert all(name in difference(old, new) for name in {*old} ^ {*new})
