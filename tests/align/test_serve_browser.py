"""The search page in headless Chromium: what a person does with it, and that nothing of others runs in it."""

import os
import shutil
from contextlib import contextmanager

import pytest
from live_server import serving
from search_world import COPY, HOSTILE, MISSING, make_world
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait
from small_world import SHADES, draw

from sail_align.align.runs.checkpoint import load_run
from sail_align.align.search.index import SearchIndex
from sail_align.align.search.query import parse_query
from sail_align.extract.store.store import Store

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
IS_HERE = bool(CHROMIUM and DRIVER)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IS_HERE and not os.environ.get("CI"), reason="chromium and chromedriver are not on PATH"),
]

GIVE = """
const [kind, source, done] = arguments;
fetch(source).then(answer => answer.blob()).then(blob => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([blob], "picture.jpg", {type: "image/jpeg"}));
  const options = {bubbles: true, cancelable: true};
  for (const step of kind === "drop" ? ["dragover", "drop"] : ["paste"])
    document.body.dispatchEvent(kind === "drop"
      ? new DragEvent(step, {...options, dataTransfer: transfer})
      : new ClipboardEvent(step, {...options, clipboardData: transfer}));
  done();
});
"""
"""Script that drops or pastes the picture at a URL."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("browsed"))


@pytest.fixture(scope="module")
def index(world):
    return SearchIndex.open(load_run(world.run), [Store.open(world.store)])


@pytest.fixture(scope="module")
def live(index):
    with serving([index]) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    for option in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(option)
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    downloads = tmp_path_factory.mktemp("downloads")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.downloads = downloads
    yield driver
    driver.quit()


class Page:
    """The page, as a person sees it."""

    def __init__(self, browser, url):
        self.browser, self.url = browser, url

    def open(self, path="/"):
        self.browser.get(self.url + path)
        return self

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        (found,) = self.all(selector)
        return found

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def until(self, condition):
        return WebDriverWait(self.browser, 60, poll_frequency=0.05).until(lambda _: condition())

    @contextmanager
    def new_results(self):
        """Wait until what the block does has replaced the results."""
        self.run("document.querySelector('#results').dataset.old = ''")
        yield
        self.until(lambda: self.run("return document.querySelector('#results:not([data-old])') !== null"))

    @property
    def keys(self):
        return self.run("return [...document.querySelectorAll('.hit')].map(each => each.dataset.key)")

    @property
    def path(self):
        return self.run("return decodeURIComponent(location.search)")

    def search(self, text):
        box = self.one("#q")
        box.clear()
        with self.new_results():
            box.send_keys(text, Keys.ENTER)

    def resize(self, width, scheme="light"):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


@pytest.fixture
def page(browser, live):
    page = Page(browser, live.url)
    page.resize(1280)
    page.open()
    page.run("localStorage.clear()")
    page.open()
    browser.get_log("browser")
    yield page
    complaints = [entry["message"] for entry in browser.get_log("browser")]
    assert [each for each in complaints if "status of 400" not in each] == []  # what the tests provoke


def results(index, query, count=24):
    return [hit.facts.key for hit in index.search(parse_query(query), count).hits]


def test_text_is_searched_and_pictures_are_shown(page, index):
    assert page.run("return document.activeElement.id") == "q"
    page.search("a red cat")
    assert page.keys == results(index, "a red cat")
    assert page.path == "?q=a+red+cat"
    assert page.browser.title.startswith("a red cat – search in photos")
    assert page.one("#status").text == page.one("[data-status]").text
    page.until(lambda: all(page.run("return [...document.images].map(each => each.complete)")))
    assert min(page.run("return [...document.images].map(each => each.naturalWidth)")) > 0
    assert all(image.get_attribute("alt") for image in page.all("#results img"))


def test_clicked_picture_finds_similar_ones_and_back_and_forward_work(page, index):
    page.search("a red cat")
    first, key = page.keys, page.keys[3]
    with page.new_results():
        page.all(".hit > a")[3].click()
    assert page.path == f"?q=key:{key}"
    assert page.keys == results(index, f"key:{key}")
    with page.new_results():
        page.browser.back()
    assert (page.keys, page.one("#q").get_attribute("value")) == (first, "a red cat")
    with page.new_results():
        page.browser.forward()
    assert page.keys == results(index, f"key:{key}")
    page.open(f"/?q=key:{key}&space=frozen")  # a deep link
    frozen = [hit.facts.key for hit in index.search(parse_query(f"key:{key}"), 24, space="frozen").hits]
    assert page.keys == frozen
    assert page.run("return document.querySelector('#space').value") == "frozen"


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_given_picture_is_searched(page, kind):
    with page.new_results():
        page.browser.execute_async_script(GIVE, kind, "/rows/0/2?side=256")
    assert page.path.startswith("?picture=")
    assert set(page.keys[:2]) & {"002.png", f"{COPY:03d}.png"}
    assert len(page.all(".given img")) == 1
    with page.new_results():  # a text is added to the picture
        page.one("#q").send_keys("a dog", Keys.ENTER)
    assert "picture=" in page.path
    assert "q=a+dog" in page.path
    with page.new_results():
        page.one(".given .button").click()
    assert page.path == "?q=a+dog"


def test_chosen_file_is_searched_and_other_files_are_refused(page, tmp_path):
    draw(99, SHADES["cat"]).save(tmp_path / "cat.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with page.new_results():
        page.one("#file").send_keys(str(tmp_path / "cat.png"))
    assert page.path.startswith("?picture=")
    page.one("#file").send_keys(str(tmp_path / "bad.png"))
    page.until(lambda: "cannot be used" in page.one("#status").text)


def test_sums_are_made_with_buttons(page, index):
    page.search("a red cat")
    key = page.keys[1]
    with page.new_results():
        page.one(f"[aria-label='Subtract {key} from the query']").click()
    assert page.one("#q").get_attribute("value") == f"a red cat - key:{key}"
    assert page.keys == results(index, f"a red cat - key:{key}")
    assert page.one("[aria-label='Rows of the query'] img").get_attribute("alt")


def test_filters_choose_rows_and_can_be_removed(page):
    page.search("a red cat")
    with page.new_results():
        page.one("#label").send_keys("dog", Keys.TAB)
    assert page.path == "?q=a+red+cat&label=dog"
    assert {text.text.split(", ")[1] for text in page.all(".facts span")} == {"dog"}
    with page.new_results():
        page.one("#caption").send_keys("nothing has this", Keys.ENTER)
    assert page.keys == []
    with page.new_results():
        page.one("#results a").click()
    assert page.path == "?q=a+red+cat"
    assert page.keys


def test_marked_rows_become_a_list_for_fit(page):
    page.search("a red cat")
    chosen = page.keys[:2]
    for box in page.all(".mark")[:2]:
        box.click()
    page.search("the dog")
    assert page.one("#marked").text == "2 marked"
    assert sorted(page.run("return [...document.querySelectorAll('.mark:checked')].map(each => each.value)")) == sorted(
        set(chosen) & set(page.keys)
    )
    page.one("#save").click()
    saved = page.browser.downloads / "exclude.txt"
    page.until(saved.exists)
    page.until(lambda: saved.read_text() == "".join(f"{key}\n" for key in chosen))
    page.one("#clear").click()
    assert not page.one("#marks").is_displayed()


def test_labels_of_a_picture_are_shown_with_an_overlay(page):
    page.open("/?q=key:002.png")
    with page.new_results():
        page.one("#labels").send_keys("a red cat, the dog", Keys.ENTER)
    assert {row.text.split()[0] for row in page.all(".labels tbody th")} == {"a", "the"}
    overlay = page.one(".labels figure img")
    page.run("arguments[0].scrollIntoView()", overlay)
    page.until(lambda: page.run("return arguments[0].complete && arguments[0].naturalWidth", overlay) == 80)


def test_hostile_caption_is_text(page):
    page.search("a")
    with page.new_results():
        page.one("#caption").send_keys("onerror", Keys.ENTER)
    assert page.keys == ["003.png"]
    assert page.one(".hit .caption").get_attribute("title").startswith(HOSTILE)
    page.search(HOSTILE)
    assert page.browser.title.startswith(HOSTILE[:20])
    assert len(page.all("script")) == 1


def test_missing_file_has_a_placeholder(page):
    page.open(f"/?q=a&caption={'the'}&count=120&duplicates=1")
    image = page.one(f".hit[data-key='{MISSING:03d}.png'] img")
    page.run("arguments[0].scrollIntoView()", image)
    page.until(lambda: page.run("return arguments[0].naturalWidth", image) == 256)


def test_mistake_is_shown_and_keeps_the_query(page):
    page.search("a + + b")
    assert "a term is empty" in page.one("[role='alert']").text
    assert page.one("#q").get_attribute("value") == "a + + b"


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (360, "dark"), (1920, "dark")])
def test_page_fits_the_window(page, width, scheme):
    page.resize(width, scheme)
    for path in ("/", "/?q=a+red+cat", "/?q=key:002.png&labels=a,b"):
        page.open(path)
        assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    channels = page.run("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(channels) > 3 * 128) == (scheme == "light")
    assert page.run("return document.querySelector('#filters').open") == (width > 640)


def test_page_is_used_with_the_keyboard(page):
    page.open("/?q=a+red+cat")
    page.one("body").send_keys("/")
    assert page.run("return document.activeElement.id") == "q"
    reached = set()
    for _ in range(24):
        webdriver.ActionChains(page.browser).send_keys(Keys.TAB).perform()
        reached.add(page.run("const each = document.activeElement; return each.id || each.className || each.tagName"))
    assert {"file", "space", "split", "caption", "label", "count", "mark", "button", "A"} <= reached
    unnamed = page.run(
        "return [...document.querySelectorAll('input:not([type=hidden]), select, button, a')].filter("
        "each => !(each.labels?.length || each.getAttribute('aria-label') || each.innerText.trim()"
        " || each.querySelector('img[alt]'))).map(each => each.outerHTML)"
    )
    assert unnamed == []


def test_progress_leads_to_the_results(browser, world, tmp_path):
    index = SearchIndex.open(load_run(world.run), [Store.open(world.store)], folder=tmp_path)
    with serving([index], prepare=False) as live:
        page = Page(browser, live.url).open("/?q=a+red+cat")
        assert page.one("#progress").get_attribute("max") == "24"
        assert page.keys == []
        live.server.preparation.start()
        page.until(lambda: page.keys)
        assert page.keys == results(index, "a red cat")


def test_stopped_server_is_named(browser, index):
    with serving([index]) as live:
        page = Page(browser, live.url).open("/?q=a")
    page.one("#q").send_keys("b", Keys.ENTER)
    page.until(lambda: "does not answer" in page.one("#status").text)
