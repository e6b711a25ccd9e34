"""The page in a real browser: Debian's chromium through Playwright's client; nothing is downloaded."""

import re
import shutil
import signal

import pytest
from collect_process import CollectProcess
from people_images import make_edits, write_model

from dspo_jax.people.votes import open_votes

pytestmark = pytest.mark.slow

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no chromium on this machine", allow_module_level=True)

PROMPTS = [f"prompt number {i}" for i in range(8)]
PHONE = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}
WCAG = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}
FLAGS = ("--repeat_share=0", "--questions=general,appeal")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def folders(tmp_path):
    return [write_model(tmp_path / name, PROMPTS, first=1000 * i) for i, name in enumerate(("base", "mine"))]


@pytest.fixture
def begin(tmp_path):
    """Starts `collect`."""

    def start(folders, *flags):
        started.append(CollectProcess(folders, tmp_path / "votes.sqlite", *flags))
        return started[-1]

    started = []
    yield start
    for server in started:
        server.process.kill()
        server.process.wait()
        server.process.stdout.close()


class Person:
    """Somebody at the page; every step waits until the page is ready for the next."""

    def __init__(self, browser, url, name, **device):
        self.context = browser.new_context(**device)
        self.page = self.context.new_page()
        self.faults = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda line: line.type == "error" and self.faults.append(line.text))
        self.requested = []
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.goto(url)
        self.page.get_by_label("Your name").fill(name)
        self.page.get_by_role("button", name="Start").click()
        self.wait()

    def wait(self, other_than=None):
        self.page.wait_for_function(
            "before => document.body.dataset.ready && document.body.dataset.ready !== before",
            arg=other_than,
            timeout=15_000,
        )
        return self.page.evaluate("document.body.dataset.ready")

    def act(self, action, *arguments):
        """Does something that changes what is shown, and returns it."""
        before = self.page.evaluate("document.body.dataset.ready")
        action(*arguments)
        return self.wait(before)

    def key(self, name):
        return self.act(self.page.keyboard.press, name)

    def progress(self):
        return self.page.locator("#progress").inner_text()


def choices(path):
    """The votes that stand: (number of the showing, question, the place chosen or a word)."""
    store = open_votes(path)
    found = [
        (
            vote.showing.number,
            vote.question,
            vote.choice if isinstance(vote.choice, str) else vote.showing.places.index(vote.choice),
        )
        for vote in store.votes()
    ]
    store.close()
    return found


def test_a_session_by_keys_with_reload_undo_and_a_dead_server(browser, folders, begin, tmp_path):
    server = begin(folders, *FLAGS)
    anna = Person(browser, server.url, "Anna")
    assert anna.progress() == "0 judged, 8 left"
    for key in ("ArrowLeft", "ArrowRight", "ArrowDown", "Space"):
        shown = anna.key(key)
    votes = [(1, "general", 0), (1, "appeal", 1), (2, "general", "tie"), (2, "appeal", "skip")]
    assert choices(tmp_path / "votes.sqlite") == votes
    assert anna.progress().startswith("2 judged, 6 left")
    anna.page.reload()
    assert anna.wait() == shown
    assert anna.key("z") == "2/appeal"
    assert choices(tmp_path / "votes.sqlite") == votes[:3]
    assert anna.key("z") == "2/general"
    # The server dies; the vote waits, and is noted once when there is one again.
    server.stop(signal.SIGKILL)
    anna.page.keyboard.press("ArrowRight")
    anna.page.get_by_text("The server does not answer").wait_for()
    anna.page.keyboard.press("ArrowLeft")  # of no effect now
    server.start()
    assert anna.wait("2/general") == "2/appeal"
    assert anna.page.locator("#trouble").is_hidden()
    assert choices(tmp_path / "votes.sqlite") == [*votes[:2], (2, "general", 1)]
    while not anna.page.locator("#done").is_visible():
        anna.key("ArrowLeft")
    assert len(choices(tmp_path / "votes.sqlite")) == 16
    anna.key("z")
    assert anna.page.locator("#task").is_visible()
    faults = [fault for fault in anna.faults if "ERR_CONNECTION_REFUSED" not in fault]
    assert faults == []
    assert all(url.startswith((server.url, "data:")) for url in anna.requested)


def test_two_people_at_once_by_mouse_and_on_a_phone(browser, folders, begin, tmp_path):
    server = begin(folders, "--repeat_share=0")
    anna = Person(browser, server.url, "Anna", viewport={"width": 1280, "height": 800})
    ben = Person(browser, server.url, "Ben", **PHONE)
    boxes = {
        person: [image.bounding_box() for image in person.page.locator("button.image").all()]
        for person in (anna, ben)
    }
    left, right = boxes[anna]
    assert abs(left["y"] - right["y"]) < 1
    assert left["x"] + left["width"] <= right["x"]
    upper, lower = boxes[ben]
    assert upper["y"] + upper["height"] <= lower["y"]
    for person, size in ((anna, (1280, 800)), (ben, (390, 780))):
        for button in person.page.locator("button:visible").all():
            box = button.bounding_box()
            assert box["x"] >= 0
            assert box["y"] >= 0
            assert box["x"] + box["width"] <= size[0]
            assert box["y"] + box["height"] <= size[1]
    for number in range(8):
        if number < 7:
            anna.act(anna.page.locator("button.image").nth(1).click)
        ben.act(ben.page.locator("button.image").nth(0).tap)
    anna.act(anna.page.get_by_role("button", name="Undo").click)
    anna.act(anna.page.get_by_role("button", name="Tie").click)
    # The space bar skips, as the button was pressed by the mouse.
    anna.key("Space")
    assert anna.page.locator("#done").is_visible()
    assert ben.page.locator("#done").is_visible()
    store = open_votes(tmp_path / "votes.sqlite")
    names = store.people()
    said = {name: [] for name in names.values()}
    for vote in store.votes():
        place = vote.choice if isinstance(vote.choice, str) else vote.showing.places.index(vote.choice)
        said[names[vote.showing.person]].append(place)
    store.close()
    assert said == {"Anna": [1] * 6 + ["tie", "skip"], "Ben": [0] * 8}
    assert anna.faults == ben.faults == []


def test_three_images_are_ranked_by_digits_and_clicks(browser, folders, begin, tmp_path):
    folders.append(write_model(tmp_path / "third", PROMPTS, first=5000))
    server = begin(folders, "--rank")
    anna = Person(browser, server.url, "Anna")
    anna.page.keyboard.press("3")
    anna.page.keyboard.press("z")  # takes back the rank
    anna.page.keyboard.press("2")
    assert anna.page.locator("button.image kbd").all_inner_texts() == ["1", "rank 1", "3"]
    anna.act(anna.page.locator("button.image").nth(0).click)
    store = open_votes(tmp_path / "votes.sqlite")
    [vote] = store.votes()
    store.close()
    assert vote.choice == tuple(vote.showing.places[i] for i in (1, 0, 2))


def test_tab_and_space_press_the_button_that_has_the_focus(browser, folders, begin, tmp_path):
    server = begin(folders, "--repeat_share=0")
    anna = Person(browser, server.url, "Anna")
    anna.page.get_by_role("button", name="Tie").focus()
    anna.key("Space")
    assert choices(tmp_path / "votes.sqlite") == [(1, "general", "tie")]


def test_an_image_that_cannot_be_shown_says_so(browser, folders, begin):
    for file in folders[0].glob("0-*/*.png"):
        file.write_bytes(b"no picture")
    server = begin(folders)
    anna = Person(browser, server.url, "Anna")
    assert anna.page.get_by_text("This image cannot be shown. Please skip.").count() == 1


@pytest.mark.parametrize("device", [{}, PHONE], ids=["screen", "phone"])
def test_edits_stand_beside_the_picture_that_was_edited(device, browser, folders, begin):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    for folder in folders:
        make_edits(folder, range(8))
        (folder / "init_images/0.png").write_bytes(b"no picture")
    server = begin(folders, "--repeat_share=0")
    anna = Person(browser, server.url, "Anna", **device)
    failed = 0
    while not anna.page.locator("#done").is_visible():
        original = anna.page.get_by_alt_text("original image")
        assert original.count() == 1
        failed += anna.page.locator("#original").get_by_text("This image cannot be shown").count()
        if original.evaluate("image => image.naturalWidth"):
            size = anna.page.viewport_size
            boxes = [each.bounding_box() for each in (original, *anna.page.locator("button.image").all())]
            for box in boxes:
                assert box["width"] > 100
                assert box["height"] > 80
                assert 0 <= box["x"] <= box["x"] + box["width"] <= size["width"]
                assert 0 <= box["y"] <= box["y"] + box["height"] <= size["height"]
            assert axe.run(anna.page, options=WCAG).response["violations"] == []
        anna.key("ArrowLeft")
    assert failed == 1


@pytest.mark.parametrize("device", [{}, PHONE], ids=["screen", "phone"])
def test_contrast_labels_and_the_rest_of_wcag(device, browser, folders, begin):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    server = begin(folders, "--repeat_share=0")
    context = browser.new_context(**device)
    page = context.new_page()
    page.goto(server.url)
    assert axe.run(page, options=WCAG).response["violations"] == []
    anna = Person(browser, server.url, "Anna", **device)
    assert axe.run(anna.page, options=WCAG).response["violations"] == []
    while not anna.page.locator("#done").is_visible():
        anna.key("ArrowLeft")
    assert axe.run(anna.page, options=WCAG).response["violations"] == []


def test_a_script_in_prompts_and_names_is_text(browser, tmp_path, begin):
    script = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
    folders = [
        write_model(tmp_path / name, [script], first=1000 * i) for i, name in enumerate(("base", "mine"))
    ]
    server = begin(folders, f"--questions=own={script.replace(',', ' ')}")
    anna = Person(browser, server.url, script[:80])
    assert anna.page.locator("#prompt").inner_text() == script
    assert script in anna.page.locator("#question").inner_text()
    assert anna.page.title() == "Which image is better?"
    assert not re.search("taken", anna.page.title())
