"""How a browser lays a page out: Debian's Chromium, without a window, for the tests of reports."""

import re
import shutil
import subprocess
from pathlib import Path

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
_MEASURE = "<script>document.title = document.documentElement.scrollWidth - window.innerWidth</script>"


def laid_out(html: str, folder: Path, width: int) -> tuple[int, str]:
    """By how many pixels a page is wider than a window of this width, and its document.

    A script that is added to a copy of the page, in `folder`, measures it.
    """
    chromium = shutil.which("chromium")
    assert chromium is not None, "apt-get install chromium"
    copy = folder / "page.html"
    copy.write_text(html + _MEASURE)
    own = (f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", "--dump-dom", copy.as_uri())
    shown = subprocess.run([chromium, *_FLAGS, *own], capture_output=True, text=True, check=True, timeout=120).stdout
    (excess,) = re.findall(r"<title>(-?\d+)</title>", shown)
    return int(excess), shown
