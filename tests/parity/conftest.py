"""Starts the probes of a framework once per session, and prints the margins at the end.

Frameworks start slowly: all runs that the chosen tests need share as few worker processes as the
framework allows. A module says which it needs in `configs(framework, folder)`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import pytest

from common.oracle.limits import Comparison
from common.spec.run import FRAMEWORKS, RunConfig
from tests.parity.ladder import EXTREME_NOISE, Probed, Runs, extreme_config, run_probes

MARGINS: dict[tuple[str, ...], dict[str, tuple[float, str]]] = defaultdict(dict)
"""By framework, precision and test: of each check the worst share of its limit, and whose it is."""


@pytest.fixture(scope="session", params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def runs(
    framework: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    """By name. Where they fail, all tests of the framework do, and nothing runs again."""
    folder = tmp_path_factory.mktemp(framework)
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    wanted: dict[str, RunConfig] = {}
    for module in dict.fromkeys(item.module for item in items if "runs" in item.fixturenames):
        wanted |= module.configs(framework, folder)
    found = run_probes(wanted, folder, {extreme_config(framework): EXTREME_NOISE})
    return {name: Probed(one, found[name]) for name, one in wanted.items()}


@pytest.fixture
def judge(request: pytest.FixtureRequest) -> Callable[[str, str, Comparison], None]:
    """Fails with the first tensor that differs; records how much of each limit was used."""
    # Apart by test: logits far apart always need much, and would hide a case that needs more.
    test = request.node.originalname.removeprefix("test_").replace("_", " ")
    case = str(request.node.callspec.params.get("case", ""))

    def check(framework: str, dtype: str, comparison: Comparison) -> None:
        _keep_worst(
            (framework, dtype, test), {n: (r, case) for n, r in comparison.margins().items()}
        )
        assert comparison.passed, comparison.report()

    return check


def _keep_worst(key: tuple[str, ...], found: dict[str, tuple[float, str]]) -> None:
    together = MARGINS[key]
    together |= {name: max(each, together.get(name, (0.0, ""))) for name, each in found.items()}


def pytest_sessionfinish(session: pytest.Session) -> None:
    # In a worker of pytest-xdist: the summary is printed elsewhere.
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["margins"] = [(*key, worst) for key, worst in MARGINS.items()]


class MarginsOfWorkers:
    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object) -> None:
        for *key, worst in getattr(node, "workeroutput", {}).get("margins", []):
            _keep_worst(tuple(key), worst)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(MarginsOfWorkers())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not MARGINS:
        return
    terminalreporter.section("parity margins: worst observed value / its limit (below 1 passes)")
    for (framework, dtype, test), worst in sorted(MARGINS.items()):
        cells = (f"{name} {ratio:.3f} {case}".rstrip() for name, (ratio, case) in worst.items())
        terminalreporter.write_line(f"{framework:<11}{dtype:<9}{test}: {', '.join(cells)}")
