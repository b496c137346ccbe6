"""All that is solved is solved from sums of products, and from rows."""

import pytest
import regressions


@pytest.fixture(autouse=True, params=["sums", "rows"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(regressions, "FORM", request.param)
    return str(request.param)
