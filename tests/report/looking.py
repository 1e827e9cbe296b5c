"""How pages are looked at: at each width, light and dark, and by axe-core."""

from __future__ import annotations

import os
from pathlib import Path

SCREENS = Path(os.environ.get("LAUNCH_SCREENS", Path(__file__).parent / "screens"))
"""Where screenshots are kept, for people to look at."""
WIDTHS = (400, 900, 1400)

OVERFLOW = """[...document.querySelectorAll("body *")].filter(one =>
  !one.closest(".scroll > *, svg, details:not([open]) *") && one.getBoundingClientRect().right > innerWidth + 1)
  .map(one => one.outerHTML.slice(0, 120))"""


def look_at(browser, file, screens=None):
    """Show a page at every width; nothing may be wider than the window, and nothing complained of.

    Args:
        browser: to show it in.
        file: the page.
        screens: begin of the names of its screenshots; None: make none.
    """
    SCREENS.mkdir(exist_ok=True)
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            browser.scheme(scheme)
            seconds = browser.open(file.as_uri(), width)
            assert browser.run("document.documentElement.scrollWidth <= innerWidth"), (width, browser.run(OVERFLOW))
            assert browser.run(OVERFLOW) == []
            if screens:
                browser.picture(screens.with_name(f"{screens.name}-{width}-{scheme}.png"))
        print(f"{file.name} at {width} px: {seconds:.2f} s, {file.stat().st_size / 1e6:.2f} MB")
    assert browser.complaints == []


def serious(browser, axe):
    """What axe-core finds in the page that is shown, but for what is minor."""
    browser.run(axe + "; 0")
    found = browser.run("axe.run(document).then(found => found.violations)")
    return [
        (one["id"], one["help"], [node["html"][:150] for node in one["nodes"]][:3])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
