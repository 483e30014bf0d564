"""Laws of the strict JSON reader: it takes exactly the JSON that every other reader agrees on."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmctl.serving.api_error import ApiError
from glmctl.serving.body import MAX_CONTAINERS, MAX_DEPTH, MAX_VALUES, parse

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(), VALUES, max_size=5), st.booleans())
def test_every_proper_object_is_read_as_it_is(value: dict[str, object], escaped: bool) -> None:
    raw = json.dumps(value, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    assert parse(raw) == value


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,0123456789eE.-+truefalsn\\u d8', max_size=60).map(str.encode))
def test_any_bytes_are_an_object_or_an_api_error(raw: bytes) -> None:
    try:
        value = parse(raw)
    except ApiError as error:
        status, body = error.status, error.body()
    else:
        status, body = 400, value
    assert status == 400
    json.dumps(body, ensure_ascii=False).encode("utf-8")


def test_depth_is_bounded_exactly() -> None:
    def nested(depth: int) -> bytes:
        return ('{"a":' * depth + "1" + "}" * depth).encode()

    parse(nested(MAX_DEPTH))
    with pytest.raises(ApiError, match="deeper"):
        parse(nested(MAX_DEPTH + 1))


@pytest.mark.parametrize(
    ("item", "most"), [(b"1", MAX_VALUES), (b"{}", MAX_CONTAINERS - 2), (b"[]", MAX_CONTAINERS - 2)]
)
def test_values_and_containers_are_counted_exactly(item: bytes, most: int) -> None:
    def listed(count: int) -> bytes:
        return b'{"a":[' + b",".join([item] * count) + b"]}"

    assert len(parse(listed(most))["a"]) == most
    with pytest.raises(ApiError, match="more than"):
        parse(listed(most + 1))


def test_text_may_hold_any_number_of_brackets_and_commas() -> None:
    text = '[{,\\"' * MAX_VALUES
    assert parse(json.dumps({"a": text, "b": [text]}).encode()) == {"a": text, "b": [text]}


@pytest.mark.parametrize("raw", [b'{"a":NaN}', b'{"a":-Infinity}', b'{"a":1e400}', b'{"a":' + b"1" * 21 + b"}"])
def test_numbers_beyond_json_are_refused(raw: bytes) -> None:
    with pytest.raises(ApiError) as error:
        parse(raw)
    assert error.value.code == "invalid_number"


def test_the_repeated_key_is_named() -> None:
    with pytest.raises(ApiError) as error:
        parse(b'{"x": {"b": 1, "a": 1, "b": 2}}')
    assert error.value.param == "b"
