"""The documentation in a browser: each page loads, from here alone, and reads well in light, in dark and on a phone."""

import contextlib
import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
pytest.importorskip("mkdocs", reason="needs the package mkdocs")

ROOT = Path(__file__).parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # What a page asks of another machine fails, and does not leave this one.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")

# The search loads its files behind the page: they would be cut off where the next page is opened. It has its own test.
NO_SEARCH = "Worker = class extends EventTarget { postMessage() {} }"

# What the page itself knows. Formulas are looked for where a reader sees text, not in code.
LOOK = r"""() => {
  const seen = document.body.cloneNode(true);
  seen.querySelectorAll("script, style, template, pre, code, .katex").forEach((element) => element.remove());
  return {
    ids: [...document.querySelectorAll("[id]")].map((element) => element.id),
    links: [...document.querySelectorAll("a[href]")].map((link) => link.href),
    images: [...document.images].filter((image) => !image.naturalWidth).map((image) => image.src),
    formulas: document.querySelectorAll(".katex").length,
    plain: [...document.querySelectorAll(".arithmatex:not(:has(.katex)), .katex-error")].map((e) => e.textContent),
    tex: seen.textContent.match(/\\[([].*|\$\$.*|\$[^$\s]*[\\_^][^$]*\$/g) ?? [],
  };
}"""
BACKGROUND = "() => getComputedStyle(document.body).backgroundColor"
OVERFLOW = "() => document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth"


class Quiet(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # one connection for many files

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def served(folder):
    """The address at which a folder is served to this machine."""
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@contextlib.contextmanager
def opened_browser():
    """A page of a browser, and a list that what goes wrong on it is added to."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page, wrong = browser.new_page(viewport=PHONE), []

        def stays(request):
            if urlsplit(request.url).hostname not in ("127.0.0.1", None):
                wrong.append(f"leaves this machine: {request.url}")

        page.on("request", stays)
        page.on("requestfailed", lambda request: wrong.append(f"request failed: {request.url}"))
        page.on("response", lambda response: response.status >= 400 and wrong.append(f"not found: {response.url}"))
        page.on("console", lambda message: message.type == "error" and wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        yield page, wrong
        browser.close()


def visit(page, address, wrong):
    """What a page knows of itself; what a reader would mind is added to `wrong`."""
    page.emulate_media(color_scheme="light")
    page.goto(address)
    look = page.evaluate(LOOK)
    wrong += [f"no image: {image}" for image in look["images"]]
    wrong += [f"formula not rendered: {text}" for text in look["plain"] + look["tex"]]
    light = page.evaluate(BACKGROUND)
    page.emulate_media(color_scheme="dark")
    try:
        page.wait_for_function(f"light => ({BACKGROUND})() !== light", arg=light, timeout=3000, polling=20)
    except playwright.TimeoutError:
        wrong.append(f"dark is as light: {light}")
    if (pixels := page.evaluate(OVERFLOW)) > 0:
        wrong.append(f"scrolls sideways on a phone by {pixels} pixels")
    return look


def broken(links, address, ids):
    """The links of a page to places of the site that are not there.

    Args:
        links: full addresses.
        address: of the site.
        ids: `{address of a page or file: the places on it that a link can name}`.
    """
    for link in links:
        page, place = urldefrag(link)
        if page.startswith(address) and (page not in ids or (place and unquote(place) not in ids[page])):
            yield link


def check(folder):
    """Opens each page of a site: `({page: what it knows of itself}, {page: what is wrong})`."""
    looks, faults = {}, {}
    with served(folder) as address, opened_browser() as (page, wrong):
        page.add_init_script(NO_SEARCH)
        for path in sorted(Path(folder).rglob("*.html")):
            at = urljoin(address, re.sub(r"(^|/)index\.html$", r"\1", str(path.relative_to(folder))))
            looks[at] = visit(page, at, wrong)
            faults[at], wrong[:] = list(wrong), []
        ids = {urljoin(address, str(path.relative_to(folder))): () for path in Path(folder).rglob("*.*")}
        ids |= {at: set(look["ids"]) for at, look in looks.items()}
        for at, look in looks.items():
            faults[at] += [f"leads nowhere: {link}" for link in sorted(set(broken(look["links"], address, ids)))]
    name = {at: at.removeprefix(address) for at in looks}
    return {name[at]: look for at, look in looks.items()}, {name[at]: found for at, found in faults.items() if found}


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_every_page_and_the_search(site):
    looks, faults = check(site)
    assert not faults
    assert len(looks) > 60
    assert looks["contract/"]["formulas"] > 1
    with served(site) as address, opened_browser() as (page, wrong):
        page.set_viewport_size(DESKTOP)
        page.goto(address)
        page.locator("input.md-search__input").press_sequentially("LSTM")
        page.wait_for_selector(".md-search-result__link")
        found = page.eval_on_selector_all(".md-search-result__link", "links => links.map(link => link.href)")
        assert any(urlsplit(link).path == "/api/layers/LSTM/" for link in found), found
        assert not wrong


SOUND = """<!doctype html><html><head><title>A page</title><link rel="icon" href="data:,"><style>
body { background: white; } @media (prefers-color-scheme: dark) { body { background: black; } }
</style></head><body>%s</body></html>"""
FAULTS = {
    "console: ": "<script>console.error('a fault')</script>",
    "error: ": "<script>nothing.at.all()</script>",
    "not found: ": "<link rel=stylesheet href=missing.css>",
    "leaves this machine: ": "<img src=https://example.com/image.png>",
    "request failed: ": "<img src=https://example.com/image.png>",
    "no image: ": "<img src=index.html>",
    "formula not rendered: ": "<p>With <span class=arithmatex>x = y</span></p>",
    "formula not rendered: \\(": r"<p>With \(x = y\)</p>",
    "formula not rendered: $": r"<p>With $x_t = \alpha$</p>",
    "formula not rendered: x^": "<span class='katex-error'>x^</span>",
    "dark is as light: ": "<style>body { background: white !important; }</style>",
    "scrolls sideways on a phone by ": "<div style='width: 500px'>wide</div>",
    "leads nowhere: ": "<a href=missing/>a page that is not there</a>",
    "leads nowhere:": "<a href=#missing>a place that is not there</a>",
}


def test_faults_of_a_page_are_found(tmp_path):
    sound = "<a href=#place id=place>$5</a> or $6 for <code>$x_t$</code>, says <a href='mailto:a@example.com'>A</a>"
    (tmp_path / "index.html").write_text(SOUND % sound)
    for number, fault in enumerate(FAULTS.values()):
        (tmp_path / f"{number}.html").write_text(SOUND % fault)
    faults = check(tmp_path)[1]
    assert "" not in faults
    for number, fault in enumerate(FAULTS):
        found = faults.get(f"{number}.html", [])
        assert any(line.startswith(fault) for line in found), f"{fault}{found}"
