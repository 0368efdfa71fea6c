"""Keys: equal exactly when the actions are equal."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.store import Action, canonical_json

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
configs = st.dictionaries(st.text(), values, max_size=4)


def _typed(value: object) -> object:
    """A value in which 1, 1.0 and True differ, as they do in JSON but not in Python's ==."""
    if isinstance(value, dict):
        return {key: _typed(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_typed(child) for child in value]
    return (type(value).__name__, repr(value))


@given(values, values)
def test_distinct_values_have_distinct_bytes(first: object, second: object) -> None:
    assert (canonical_json(first) == canonical_json(second)) == (_typed(first) == _typed(second))


@given(configs)
def test_the_order_of_keys_does_not_matter(config: dict[str, object]) -> None:
    turned = dict(reversed(list(config.items())))
    assert Action("s", 1, config).key == Action("s", 1, turned).key


@given(configs, configs)
def test_config_and_inputs_do_not_mix(first: dict[str, object], second: dict[str, object]) -> None:
    one, other = Action("s", 1, first, {"x": "1"}), Action("s", 1, second, {"x": "1"})
    assert (one.key == other.key) == (_typed(first) == _typed(second))
