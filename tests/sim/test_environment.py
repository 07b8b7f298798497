"""Test the checks of what an environment declares."""

from __future__ import annotations

from typing import Any

import pytest

from imagewam_cli.errors import PluginError
from imagewam_cli.evaluation.closed_loop import evaluate_in_simulator
from imagewam_cli.registry import Registry
from imagewam_cli.sim.environment import Environment, check_environment, interface_of, load_environment
from tests.support.scripted_policies import Line, Obedient


class NoRate(Line):
    """Like a plugin that forgot its rate."""

    def __getattribute__(self, name: str) -> Any:
        if name == "fps":
            raise AttributeError(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("fps", None), ("fps", "10"), ("fps", 0.0), ("fps", float("nan")), ("max_steps", 0), ("cameras", ("top",)),
        ("cameras", {"top": 4}), ("state_names", "x"), ("action_names", ()), ("splits", ()), ("name", 3),
    ],
)  # fmt: skip
def test_a_wrong_declaration_is_named_with_what_it_must_be(attribute: str, value: object) -> None:
    env = Line()
    check_environment(env, "line")
    setattr(env, attribute, value)
    with pytest.raises(PluginError, match=f"the environment 'line' .*{attribute}") as error:
        check_environment(env, "line")
    assert error.value.hint is not None
    assert error.value.hint.startswith(f"{attribute} must be ")


def test_an_environment_without_a_rate_is_not_evaluated() -> None:
    with pytest.raises(PluginError, match="does not declare fps"):
        evaluate_in_simulator(NoRate, Obedient(), episodes=1, splits=["test"])


def test_an_environment_that_lacks_a_method_is_a_plugin_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unfinished(Environment):
        pass

    class Catalog:
        environments = property(lambda self: self)

        def load(self, name: str) -> type[Environment]:
            return Unfinished

    monkeypatch.setattr(Registry, "installed", classmethod(lambda cls: Catalog()))
    with pytest.raises(PluginError, match=r"'unfinished' cannot be created: .*abstract"):
        load_environment("unfinished")


def test_the_interface_has_the_names_and_the_rate() -> None:
    found = interface_of(Line())
    assert (found.what, found.fps, found.action_names) == ("the environment 'line'", 10.0, ("dx",))
    assert (found.cameras, found.state_names) == (("top",), ("x",))
