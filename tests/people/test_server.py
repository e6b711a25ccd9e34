"""The page over HTTP: a session, blindness, and what is refused."""

import concurrent.futures
import io
import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from collect_process import CollectProcess
from people_images import ORIGIN, Judge, make_edits, names_of, write_model
from PIL import Image
from processes import ROOT
from tables import each_row

pytest.importorskip("starlette")
pytest.importorskip("jinja2")
httpx = pytest.importorskip("httpx2")

from starlette.testclient import TestClient  # noqa: E402

from dspo_jax.people import server  # noqa: E402
from dspo_jax.people.groups import read_groups  # noqa: E402
from dspo_jax.people.server import MAX_BODY, make_app  # noqa: E402
from dspo_jax.people.votes import Plan, create, open_votes  # noqa: E402

SECRET_NAME = "quagga"  # of a model, which is in nothing that a page gets
PROMPTS = [f"prompt number {i}" for i in range(12)]


@pytest.fixture
def folders(tmp_path):
    """The folders of two models."""
    names = (SECRET_NAME, f"{SECRET_NAME}_tuned")
    return [write_model(tmp_path / name, PROMPTS, first=1000 * i) for i, name in enumerate(names)]


class Page:
    """A collection of its own, and browsers on its page."""

    def __init__(self, folders, out, token, rank, plan):
        self.store = create(out, plan, read_groups(list(map(str, folders)), rank=rank))
        self.app = make_app(self.store, token=token)

    def browse(self):
        return TestClient(self.app, base_url=ORIGIN)

    def enter(self, name="Anna"):
        return Judge(self.browse(), name)

    def votes(self):
        """Reads the file as another process would."""
        store = open_votes(self.store.path)
        try:
            return store.votes()
        finally:
            store.close()


@pytest.fixture
def open_page(folders, tmp_path):
    """Begins a collection."""

    def begin(token=None, rank=False, **changes):
        plan = Plan(**{"questions": {"general": "Which?"}, "repeat_share": 0.0} | changes)
        opened.append(Page(folders, tmp_path / f"{len(opened)}.sqlite", token, rank, plan))
        return opened[-1]

    opened = []
    yield begin
    for page in opened:
        page.store.close()


@pytest.fixture
def page(open_page):
    """A collection for tests that do not mind what others do on it."""
    return open_page()


def test_a_session_of_left_right_tie_skip_and_undo(open_page, tmp_path):
    page = open_page()
    browser = page.browse()
    assert "Your name" in browser.get("/").text
    anna = Judge(browser, "Anna")
    assert "Anna" in anna.page
    first = anna.state()
    assert (first["done"], first["left"], first["last"], first["text"]) == (0, 12, None, "Which?")
    assert anna.state() == first  # after a reload
    for choice in ("left", "right", "tie", "skip"):
        state = anna.vote(choice)
    assert (state["done"], state["left"]) == (4, 8)
    assert state["votes_per_minute"] is None  # too few
    waiting = anna.undo()
    assert (waiting["done"], waiting["left"]) == (3, 9)
    assert anna.vote("skip")["showing"] == state["showing"]
    assert anna.judge_all(lambda state: "left") == 8
    assert anna.state()["left"] == 0
    assert anna.state()["votes_per_minute"] > 0
    votes = page.votes()
    expected = [0, 1, None, None, *[0] * 8]  # places
    for vote, place in zip(votes, expected, strict=True):
        assert place is None or vote.choice == vote.showing.places[place]
    assert [vote.choice for vote in votes[2:4]] == ["tie", "skip"]


def test_two_people_at_once_and_one_who_comes_back(open_page):
    page = open_page()
    anna, ben = page.enter("Anna"), page.enter("Ben")
    for _ in range(3):
        anna.vote("left")
        ben.vote("tie")
    assert anna.state()["done"] == ben.state()["done"] == 3
    # What one is shown the other cannot vote on.
    state = anna.state()
    refused = ben.send("/vote", showing=state["showing"], question="general", choice="left")
    assert refused.status_code == 400
    again = Judge(page.browse(), " anna ")
    assert again.state() == state
    anna.client.post("/leave", headers={"origin": ORIGIN})
    assert anna.client.get("/state").status_code == 401
    assert again.state()["done"] == 3


def test_a_name_is_the_same_however_its_accents_are_typed(open_page):
    page = open_page()
    for name in ("J\u00fcrgen 笑", "Ju\u0308rgen 笑"):
        page.enter(name)
    assert list(page.store.people().values()) == ["Jürgen 笑"]


def test_edits_come_with_the_picture_that_was_edited(folders, open_page):
    for folder in folders:
        make_edits(folder, [7] * len(PROMPTS))
    anna = open_page().enter()
    url = anna.state()["init_image"]
    assert url not in anna.state()["images"]
    shown = np.asarray(Image.open(io.BytesIO(anna.client.get(url, params={"side": 256}).content)))
    np.testing.assert_array_equal(shown, np.asarray(Image.open(folders[0] / "init_images/7.png")))


def test_ranks_are_of_the_places_that_are_shown(folders, open_page, tmp_path):
    write_model(tmp_path / "third", PROMPTS, first=5000)
    folders.append(tmp_path / "third")
    page = open_page(rank=True)
    anna = page.enter()
    state = anna.state()
    assert len(state["images"]) == 3
    for wrong in ("left", [0, 1], [0, 1, 1], [0, 1, 3], [0, 1, True], 1, None):
        sent = anna.send("/vote", showing=state["showing"], question="general", choice=wrong)
        assert (wrong, sent.status_code) == (wrong, 400)
        assert "the places 0 to 2, best first" in sent.json()["error"]
    anna.vote([2, 0, 1])
    [vote] = page.votes()
    assert vote.choice == tuple(vote.showing.places[i] for i in (2, 0, 1))


def test_nothing_that_a_browser_gets_tells_the_model(open_page):
    anna = open_page().enter()
    got, sides = [], []
    for path in ("/", "/page/vote.js", "/page/style.css"):
        answer = anna.client.get(path)
        got += [answer.content, str(answer.headers).encode()]
    while (state := anna.state())["showing"] is not None:
        got.append(json.dumps(state).encode())
        for url in state["images"]:
            answer = anna.client.get(url, params={"side": 512})
            assert answer.headers["content-type"] == "image/webp"
            got += [answer.content, str(answer.headers).encode()]
        sides.append(names_of(state))
        anna.vote("left")
    assert len(sides) == 12
    assert not [part for part in got if SECRET_NAME.encode() in part.lower()]
    assert not [part for part in got if re.search(rb"00\d\d\d_\d|/0-|\.png|drawn by", part)]
    names = [name for pair in sides for name in pair]
    assert len(set(names)) == 24
    assert names != sorted(names)


def test_images_are_scaled_down_never_up_pixel_by_pixel_where_small_and_cached(folders, open_page):
    with Image.open(folders[0] / f"0-{SECRET_NAME}" / "00003_0.png") as original:
        pixels = np.asarray(original.convert("RGB")).tolist()
    Image.new("RGB", (900, 300), "teal").save(folders[1] / f"0-{SECRET_NAME}_tuned" / "00003_0.png")
    page = open_page()
    anna = page.enter()
    sizes = {}
    while (state := anna.state())["prompt"] != PROMPTS[3]:
        anna.vote("tie")
    for url in state["images"]:
        for side in (256, 1024):
            answer = anna.client.get(url, params={"side": side})
            picture = Image.open(io.BytesIO(answer.content))
            assert "exif" not in picture.info
            sizes.setdefault(picture.size, np.asarray(picture.convert("RGB")).tolist())
            assert "immutable" in answer.headers["cache-control"]
    assert sizes.keys() == {(12, 12), (256, 85), (900, 300)}
    assert sizes[12, 12] == pixels
    for side in ("", "257", "0", "-1", "1e9"):
        assert anna.client.get(url, params={"side": side}).status_code == 404


def test_a_damaged_image_is_told_without_its_path(folders, open_page):
    for file in folders[0].glob("0-*/*.png"):
        file.write_bytes(b"no picture " + file.name.encode())
    page = open_page()
    anna = page.enter()
    answers = [anna.client.get(url, params={"side": 256}) for url in anna.state()["images"]]
    assert sorted(answer.status_code for answer in answers) == [200, 404]
    [failed] = [answer for answer in answers if answer.status_code == 404]
    assert failed.json() == {"error": "this image cannot be shown; skip it"}


@each_row(
    "path",
    [
        "/image/../../etc/passwd",
        "/image/..%2f..%2fetc%2fpasswd",
        "/image/%2fetc%2fpasswd",
        "/image/quagga%2f0-quagga%2f00000_0.png",
        "/image/00000_0.png",
        "/image/" + "0" * 32,
        "/page/../server.py",
        "/page/..%2fserver.py",
        "/page/vote.html",
        "/page/%2fetc%2fpasswd",
        "//etc/passwd",
        "/docs",
        "/openapi.json",
    ],
)
def test_no_path_leads_to_another_file(path, page):
    anna = page.enter()
    answer = anna.client.get(path, params={"side": 256})
    assert answer.status_code == 404
    assert "root:" not in answer.text
    assert "import" not in answer.text


def test_an_image_that_becomes_a_link_out_of_its_folder_is_not_shown(folders, open_page, tmp_path):
    outside = tmp_path / "outside.png"
    Image.new("RGB", (7, 7)).save(outside)
    page = open_page()
    anna = page.enter()
    for file in (file for folder in folders for file in folder.glob("0-*/*.png")):
        file.unlink()
        file.symlink_to(outside)
    for url in anna.state()["images"]:
        answer = anna.client.get(url, params={"side": 256})
        assert answer.status_code == 404
        assert str(tmp_path) not in answer.text


def test_without_a_session_nothing_is_shown_and_nothing_voted(open_page, tmp_path):
    page = open_page()
    anna, stranger = Judge(page.browse(), "Anna"), page.browse()
    state = anna.state()
    vote = {"showing": state["showing"], "question": "general", "choice": "left"}
    for cookies in ({}, {next(iter(anna.client.cookies)): "forged"}):
        stranger.cookies = cookies
        for path in ("/state", f"{state['images'][0]}?side=256"):
            assert stranger.get(path).status_code == 401
        for path, content in (("/vote", vote), ("/undo", {"vote": 1})):
            assert stranger.post(path, json=content).status_code == 401
    assert page.votes() == []


@each_row(
    ("headers", "status"),
    [
        ({"origin": ORIGIN}, 200),
        ({"origin": "http://localhost:8765", "host": "localhost:8765"}, 200),
        ({"origin": "http://[::1]:8765", "host": "[::1]:8765"}, 200),
        ({}, 200),  # no browser leaves it out
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://evil.example:8765", "host": "evil.example:8765"}, 403),  # DNS rebinding
        ({"origin": "http://127.0.0.1.evil.example", "host": "127.0.0.1.evil.example"}, 403),
    ],
)
def test_votes_from_other_pages_are_refused(headers, status, page):
    anna, before = page.enter(str(headers)), len(page.votes())
    state = anna.state()
    vote = {"showing": state["showing"], "question": "general", "choice": "left"}
    session = "; ".join(f"{name}={value}" for name, value in anna.client.cookies.items())
    answer = anna.client.post("/vote", json=vote, headers={**headers, "cookie": session})
    assert answer.status_code == status
    assert len(page.votes()) - before == (status == 200)


def test_other_machines_need_the_links_token(open_page):
    page = open_page(token="a-long-word")
    for query in ("", "?token=", "?token=another", "?token=a-long-word2", "?token=%C3%A9"):
        answer = page.browse().get(f"/{query}", headers={"host": "192.168.1.7:8765"})
        assert answer.status_code == 403
        assert "Please open the link" in answer.text
    for token in ("", "another", "é"):
        stranger = page.browse()
        joined = stranger.post("/join", data={"name": "Eve", "token": token})
        assert (joined.status_code, len(stranger.cookies)) == (403, 0)
    assert 'value="Anna"' in page.browse().get("/?token=a-long-word&name=Anna").text
    anna = Judge(page.browse(), "Anna", token="a-long-word")
    assert anna.vote("left")["done"] == 1
    assert "a-long-word" not in anna.page


def test_prompts_and_names_are_text(folders, open_page):
    script = "<script>alert('x')</script>\"'&{{ 7*7 }}"
    for folder in folders:
        lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
        text = "\n".join(json.dumps({**line, "prompt": script}) for line in lines)
        (folder / "manifest.jsonl").write_text(text)
    page = open_page(questions={"general": script})
    anna = Judge(page.browse(), script)
    assert "<script>alert" not in anna.page
    assert "{{ 7*7 }}" in anna.page
    state = anna.client.get("/state")
    assert state.headers["content-type"] == "application/json"
    assert state.json()["prompt"] == state.json()["text"] == script
    for field in ("name", "token"):
        shown = page.browse().get("/", params={field: script}).text
        assert "<script>alert" not in shown
        assert "&lt;script&gt;" in shown
    # The page sets texts as texts alone.
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", (PAGE / "vote.js").read_text()
    )


PAGE = Path(server.__file__).parent / "page"


def test_every_answer_has_the_headers_and_the_page_nothing_from_elsewhere(open_page):
    page = open_page()
    anna = page.enter()
    answers = [anna.client.get(path) for path in ("/", "/state", "/absent", "/page/vote.js")]
    answers.append(anna.client.post("/vote", content=b"{"))
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "no-" in answer.headers["cache-control"]
    for file in PAGE.iterdir():
        text = file.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?:|url\(|@import|style=|onclick=", text), file
    cookie = anna.client.post("/join", data={"name": "Ben"}, follow_redirects=False)
    assert re.search(r"HttpOnly; Max-Age=\d+; Path=/; SameSite=lax", cookie.headers["set-cookie"])


@each_row(
    ("path", "content", "status"),
    [
        ("/join", b"name=" + b"x" * 10_000_000, 413),
        ("/join", b"name=" + b"x" * 81, 400),
        ("/join", b"name=%20%20", 400),
        ("/join", b"name=a%00b", 400),
        ("/join", b"name=%FF%FE", 200),  # as browsers send what is no UTF-8: replaced
        ("/join", b"\xff", 400),
        ("/join", b"&".join([b"a=b"] * 100), 400),
        ("/vote", b"x" * (MAX_BODY + 1), 413),
        ("/vote", b"[" * MAX_BODY, 400),
        ("/vote", b"[]", 400),
        ("/vote", b'{"showing": true, "question": "general", "choice": "left"}', 400),
        ("/vote", b'{"showing": 1, "question": [], "choice": "left"}', 400),
        ("/vote", b'{"showing": 1, "question": "general", "choice": {"a": 1}}', 400),
        ("/vote", b'{"showing": 1, "question": "other", "choice": "left"}', 400),
        ("/vote", b'{"showing": ' + b"9" * 5000 + b"}", 400),
        ("/vote", b'{"showing": 1e999}', 400),
        ("/undo", b'{"vote": "1"}', 400),
        ("/undo", b'{"vote": 7}', 200),
    ],
)
def test_bodies_that_are_no_votes_are_refused(path, content, status, page):
    anna = page.enter()
    anna.state()
    answer = anna.client.post(path, content=content)
    assert answer.status_code == status
    assert page.votes() == []


def test_a_port_that_is_taken_is_refused_in_one_line(folders, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = [f"--images={folders[0]}", f"--images={folders[1]}", f"--port={port}"]
        result = subprocess.run(
            [sys.executable, "-m", "dspo_jax.collect", *flags, f"--out={tmp_path / 'v'}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    assert result.returncode == 2
    assert re.fullmatch(rf"error: --host=127.0.0.1 --port={port}: cannot be listened to .*\n", result.stderr)


def test_votes_survive_sigkill_and_ctrl_c_is_the_ordinary_end(folders, tmp_path):
    server = CollectProcess(folders, tmp_path / "votes.sqlite", "--repeat_share=0")
    try:
        with httpx.Client(base_url=server.url, follow_redirects=True) as client:
            joined = client.post("/join", data={"name": "Anna"})
            assert joined.status_code == 200
            kept = []
            for number in range(8):
                state = client.get("/state").json()
                vote = {"showing": state["showing"], "question": "general", "choice": "left"}
                assert client.post("/vote", json=vote).status_code == 200
                kept.append(state["showing"])
                if number in (2, 5):
                    assert server.stop(signal.SIGKILL)[0] == -signal.SIGKILL
                    server.start()
                    assert f"{len(kept)} votes so far" in server.said[0]
                    # The answer was lost, and the page sends the vote again; the session goes on.
                    assert client.post("/vote", json=vote).json()["done"] == len(kept)
        status, said = server.stop(signal.SIGINT)
    finally:
        server.process.kill()
    assert (status, said) == (0, f"{tmp_path / 'votes.sqlite'}: 8 votes by 1 people\n")
    store = open_votes(tmp_path / "votes.sqlite")
    assert [vote.showing.number for vote in store.votes()] == kept
    store.close()


@pytest.mark.ci
def test_a_link_for_other_machines_carries_the_token_and_stays_the_same(folders, tmp_path):
    links = []
    for _ in range(2):
        server = CollectProcess(folders, tmp_path / "votes.sqlite", "--host=0.0.0.0")
        try:
            found = re.search(r"http://([^:/]+):(\d+)(/\?token=[\w-]{40,}) ", server.said[1])
            links.append((found[1], found[3]))
            with httpx.Client(base_url=f"http://127.0.0.1:{found[2]}") as client:
                assert client.get("/").status_code == 403
                assert client.get(found[3]).status_code == 200
        finally:
            server.stop(signal.SIGTERM)
    assert links[0] == links[1]
    assert links[0][0] == socket.gethostname()


@pytest.mark.ci
def test_slow_clients_and_two_hundred_at_once(folders, tmp_path):
    server = CollectProcess(folders, tmp_path / "votes.sqlite", "--repeat_share=0")
    port = int(server.url.rsplit(":", 1)[1])
    slow = []
    try:
        for _ in range(200):
            slow.append(socket.create_connection(("127.0.0.1", port)))
            slow[-1].sendall(b"POST /vote HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 999\r\n")
        began = time.monotonic()
        with httpx.Client(base_url=server.url, follow_redirects=True) as client:
            client.post("/join", data={"name": "Anna"})
            assert client.get("/state").json()["left"] == 12
        assert time.monotonic() - began < 5

        def judge(number):
            with httpx.Client(base_url=server.url, follow_redirects=True, timeout=60) as client:
                client.post("/join", data={"name": f"person {number}"})
                state = client.get("/state").json()
                vote = {"showing": state["showing"], "question": "general", "choice": "tie"}
                return client.post("/vote", json=vote).status_code

        with concurrent.futures.ThreadPoolExecutor(200) as pool:
            assert set(pool.map(judge, range(200))) == {200}
        for connection in slow:
            connection.close()
        assert server.stop(signal.SIGTERM)[0] == 0
    finally:
        server.process.kill()
    store = open_votes(tmp_path / "votes.sqlite")
    assert len({vote.showing.person for vote in store.votes()}) == 200
    store.close()


def test_the_core_does_not_import_the_page(tmp_path):
    code = (
        "import sys; import dspo_jax.people.votes, dspo_jax.people.showing, dspo_jax.people.groups, "
        "dspo_jax.collect; print(sorted({'starlette', 'uvicorn', 'jinja2', 'jax'} & sys.modules.keys()))"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (said.stdout, said.stderr) == ("[]\n", "")
    code = code.replace("dspo_jax.collect", "dspo_jax.people.server, dspo_jax.people.serving")
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout == "['jinja2', 'starlette', 'uvicorn']\n"
