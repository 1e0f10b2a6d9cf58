//! The page of `landmark serve` as a browser shows it: a text is dropped in and read, asked about, and the block that was read for the answer is lit and
//! opened. With LANDMARK_SCREENSHOTS=DIR it leaves pictures of all that there.

#![cfg(unix)]

mod support;

use fantoccini::elements::Element;
use fantoccini::key::Key;
use fantoccini::{Client, ClientBuilder, Locator};
use serde_json::json;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use support::http::Server;

const KEY: &str = "31415";
const QUESTION: &str = "What is the pass key? The pass key is";
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// `chromedriver`, which ends with its test.
struct Driver {
    child: Child,
    port: u16,
    folder: tempfile::TempDir,
}

impl Driver {
    /// Starts it on a free port; nothing where it, or Chromium, is not installed.
    fn start() -> Option<Self> {
        Command::new("chromium").arg("--version").stdout(Stdio::null()).status().ok()?;
        let mut child = Command::new("chromedriver").arg("--port=0").stdout(Stdio::piped()).spawn().ok()?;
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let port =
            lines.find_map(|line| line.trim_end_matches('.').rsplit_once("successfully on port ")?.1.parse().ok());
        // What it says later has to go somewhere.
        std::thread::spawn(move || lines.for_each(drop));
        Some(Self { child, port: port.unwrap(), folder: tempfile::tempdir().unwrap() })
    }

    /// Opens a browser of its own; `width` is that of a telephone.
    async fn open(&self, name: &str, width: Option<u32>) -> Client {
        let folder = format!("--user-data-dir={}", self.folder.path().join(name).display());
        let arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--window-size=1280,943",
            &folder,
        ];
        let mut options = json!({ "args": arguments });
        if let Some(width) = width {
            let metrics = json!({ "width": width, "height": 844, "pixelRatio": 1.0 });
            options["mobileEmulation"] = json!({ "deviceMetrics": metrics });
        }
        let capabilities = json!({ "goog:chromeOptions": options, "goog:loggingPrefs": { "browser": "ALL" } });
        ClientBuilder::new(hyper_util::client::legacy::connect::HttpConnector::new())
            .capabilities(capabilities.as_object().unwrap().clone())
            .connect(&format!("http://127.0.0.1:{}", self.port))
            .await
            .unwrap()
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until there is one of these.
async fn one(page: &Client, selector: &str) -> Element {
    let found = page.wait().at_most(PATIENCE).for_element(Locator::Css(selector)).await;
    found.unwrap_or_else(|error| panic!("{selector}: {error}"))
}

/// Those that there are.
async fn all(page: &Client, selector: &str) -> Vec<Element> {
    page.find_all(Locator::Css(selector)).await.unwrap()
}

/// Waits until there are so many.
async fn until(page: &Client, selector: &str, count: usize) {
    let begun = std::time::Instant::now();
    while all(page, selector).await.len() != count {
        assert!(begun.elapsed() < PATIENCE, "{selector}: there are not {count}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn press(page: &Client, key: Key) {
    page.active_element().await.unwrap().send_keys(&String::from(char::from(key))).await.unwrap();
}

/// Has the next answers be of so many tokens.
async fn ask_for(page: &Client, tokens: usize) {
    let field = one(page, "input[name=tokens]").await;
    field.clear().await.unwrap();
    field.send_keys(&tokens.to_string()).await.unwrap();
}

async fn ask(page: &Client, question: &str) {
    let answers = all(page, ".map .lit:first-of-type").await.len();
    one(page, "#question").await.send_keys(question).await.unwrap();
    press(page, Key::Enter).await;
    until(page, ".map .lit:first-of-type", answers + 1).await;
}

async fn picture(page: &Client, folder: &Path, name: &str) {
    fs::write(folder.join(name).with_extension("png"), page.screenshot().await.unwrap()).unwrap();
}

/// Some 20,000 tokens of a novel, with a key told in them; and the files that are read.
fn novel(folder: &Path) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let book = fs::File::open(root.join("assets/persuasion.txt.zst")).unwrap();
    let book = String::from_utf8(zstd::stream::decode_all(book).unwrap()).unwrap();
    let [at, end] = [27_000, 80_000].map(|about| about + book[about..].find('\n').unwrap());
    let told = format!("\nThe pass key is {KEY}. Remember it. {KEY} is the pass key.\n");
    let path = folder.join("Persuasion (1818).txt");
    fs::write(&path, [&book[..at], &told, &book[at..end]].concat()).unwrap();
    path
}

/// The blocks that have the key in them, as the server's own text of them says.
fn blocks_of_key(server: &Server, session: &str) -> Vec<usize> {
    let count = server.get(&format!("/v1/sessions/{session}"))["blocks"].as_u64().unwrap() as usize;
    let text = |block: usize| {
        let (from, end) = (50 * block, 50 * block + 50);
        let text = server.get(&format!("/v1/sessions/{session}/text?first_token={from}&end_token={end}"));
        text["text"].as_str().unwrap().to_string()
    };
    (0..count).filter(|&block| text(block).contains(KEY)).collect()
}

/// What a user does, in the order of doing it.
async fn use_page(page: Client, server: std::sync::Arc<Server>, novel: PathBuf, pictures: Option<PathBuf>) {
    page.goto(&server.url("/")).await.unwrap();
    one(&page, ".drop input").await.send_keys(novel.to_str().unwrap()).await.unwrap();

    // It is watched while it is read.
    one(&page, ".reading .map .unread").await;
    until(&page, ".reading", 0).await;
    let name = one(&page, "[data-session]").await.attr("data-session").await.unwrap().unwrap();
    assert_eq!(name, "Persuasion-1818");
    let tokens = server.get(&format!("/v1/sessions/{name}"))["tokens"].as_u64().unwrap();
    assert!(tokens > 15_000, "{tokens}");

    // The answer is right, and so is a block that is lit.
    ask_for(&page, 8).await;
    one(&page, "h2").await.click().await.unwrap();
    one(&page, "body").await.send_keys("/").await.unwrap();
    let focused = page.active_element().await.unwrap();
    assert_eq!(focused.attr("id").await.unwrap().as_deref(), Some("question"), "/ goes to the question");
    ask(&page, QUESTION).await;
    let written = one(&page, ".written").await.text().await.unwrap();
    assert!(written.contains(KEY), "{written}");
    let told = blocks_of_key(&server, &name);
    assert!(!told.is_empty());
    let mut lit = Vec::new();
    for cell in all(&page, ".lit").await {
        lit.push(cell.attr("data-block").await.unwrap().unwrap().parse::<usize>().unwrap());
    }
    let right = told.iter().find(|block| lit.contains(block));
    let right = right.unwrap_or_else(|| panic!("the key is in blocks {told:?}, and lit are {lit:?}"));

    // A click opens it, with the block marked and the text around it; Escape closes it.
    one(&page, &format!(".lit[data-block='{right}']")).await.click().await.unwrap();
    let marked = one(&page, ".passage mark").await.text().await.unwrap();
    assert!(marked.contains(KEY), "{marked}");
    assert!(one(&page, ".passage .prose p").await.text().await.unwrap().len() > marked.len() + 500);
    if let Some(folder) = &pictures {
        picture(&page, folder, "page-light").await;
        one(&page, ".side header button").await.click().await.unwrap();
        picture(&page, folder, "page-dark").await;
    }
    press(&page, Key::Escape).await;
    until(&page, ".passage", 0).await;
    // Arrows go from light to light, and Enter opens.
    let mut lights = all(&page, ".lit").await;
    let first = lights.remove(0);
    page.execute("arguments[0].focus()", vec![serde_json::to_value(&first).unwrap()]).await.unwrap();
    press(&page, Key::Right).await;
    let next = page.active_element().await.unwrap().attr("data-block").await.unwrap();
    assert_eq!(next, lights[0].attr("data-block").await.unwrap());
    press(&page, Key::Enter).await;
    one(&page, ".passage mark").await;
    press(&page, Key::Escape).await;
    until(&page, ".passage", 0).await;

    // It is all there after the page was left.
    page.refresh().await.unwrap();
    one(&page, &format!("[data-session='{name}'][aria-current=page]")).await;
    until(&page, ".written", 1).await;
    ask(&page, QUESTION).await;
    assert!(all(&page, ".written").await.pop().unwrap().text().await.unwrap().contains(KEY));
    assert_eq!(all(&page, ".trouble").await.len(), 0);

    // A document that is no plain text; and one that cannot be read, of which nothing stays.
    let folder = novel.parent().unwrap();
    let (good, bad) = (folder.join("garden.html"), folder.join("broken.pdf"));
    fs::write(&good, "<title>no</title><p>The <b>garden</b> key is 27182.").unwrap();
    fs::write(&bad, "%PDF-1.4 of nothing").unwrap();
    one(&page, ".add input").await.send_keys(good.to_str().unwrap()).await.unwrap();
    one(&page, "[data-session=garden][aria-current=page]").await;
    one(&page, "#question").await;
    until(&page, ".reading", 0).await;
    let count = server.get("/v1/sessions/garden")["tokens"].as_u64().unwrap();
    let text = server.get(&format!("/v1/sessions/garden/text?first_token=0&end_token={count}"));
    assert_eq!(text["text"], "The garden key is 27182.");
    one(&page, ".add input").await.send_keys(bad.to_str().unwrap()).await.unwrap();
    assert!(one(&page, ".trouble").await.text().await.unwrap().contains("damaged"));
    until(&page, "[data-session=broken]", 0).await;
    until(&page, "[data-session]", 2).await;
}

/// The same on a telephone: nothing is wider than it is.
async fn use_phone(page: Client, server: std::sync::Arc<Server>, pictures: Option<PathBuf>) {
    page.goto(&server.url("/")).await.unwrap();
    one(&page, "[data-session^=Persuasion]").await.click().await.unwrap();
    ask_for(&page, 8).await;
    ask(&page, QUESTION).await;
    let too_wide = "return document.documentElement.scrollWidth > innerWidth";
    assert_eq!(page.execute(too_wide, vec![]).await.unwrap(), false);
    if let Some(folder) = &pictures {
        picture(&page, folder, "page-phone").await;
    }
    one(&page, ".reads button").await.click().await.unwrap();
    one(&page, ".passage mark").await;
    assert_eq!(page.execute(too_wide, vec![]).await.unwrap(), false);
    one(&page, ".passage header button").await.click().await.unwrap();
    one(&page, ".back").await.click().await.unwrap();
    one(&page, ".drop").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_text_is_read_asked_and_opened_in_a_browser() {
    let Some(driver) = Driver::start() else {
        eprintln!("skipped: chromium and chromedriver are not both installed");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/landmark-12m");
    let flags = format!("--checkpoint {} --sessions sessions", model.display());
    let server = std::sync::Arc::new(Server::start(folder.path(), &flags));
    let pictures = std::env::var_os("LANDMARK_SCREENSHOTS").map(PathBuf::from);

    let desk = driver.open("desk", None).await;
    let path = novel(folder.path());
    let ended = tokio::spawn(use_page(desk.clone(), server.clone(), path, pictures.clone())).await;
    close(desk, ended).await;
    let phone = driver.open("phone", Some(390)).await;
    let ended = tokio::spawn(use_phone(phone.clone(), server, pictures)).await;
    close(phone, ended).await;
}

/// Closes the browser, and fails if the test did, with a picture of what was there.
async fn close(page: Client, ended: Result<(), tokio::task::JoinError>) {
    let failed = ended.err().map(tokio::task::JoinError::into_panic);
    if failed.is_some() {
        let path = std::env::temp_dir().join("landmark-page-failed.png");
        fs::write(&path, page.screenshot().await.unwrap()).unwrap();
        eprintln!("what the browser showed is in {}", path.display());
    }
    page.close().await.unwrap();
    if let Some(failed) = failed {
        std::panic::resume_unwind(failed);
    }
}

/// The files come without a key, and bring what keeps other sites' scripts out; what they ask for wants one.
#[test]
fn the_page_is_let_in_and_lets_nothing_in() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("keys"), "secret\n").unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/landmark-12m");
    let flags = format!("--checkpoint {} --sessions sessions --api_key_file keys", model.display());
    let server = Server::start(folder.path(), &flags);
    for (path, kind) in [
        ("/", "text/html; charset=utf-8"),
        ("/page.js", "text/javascript; charset=utf-8"),
        ("/page.css", "text/css; charset=utf-8"),
        ("/icon.svg", "image/svg+xml"),
    ] {
        let reply = server.ask("GET", path, "", None);
        assert_eq!(reply.status, 200, "{path}");
        for header in [
            &format!("content-type: {kind}"),
            "content-security-policy: default-src 'none'; script-src 'self'; style-src 'self';",
            "frame-ancestors 'none'",
            "x-content-type-options: nosniff",
            "cache-control: no-cache",
        ] {
            assert!(reply.headers.contains(header), "{path}: {header}: {reply:?}");
        }
        let etag = reply.headers.split("etag: ").nth(1).unwrap().lines().next().unwrap();
        let again = server.ask("GET", path, &format!("if-none-match: {etag}\r\n"), None);
        assert_eq!((again.status, again.body.as_str()), (304, ""));
        assert_eq!(server.ask("POST", path, "", Some("{}")).status, 405);
    }
    assert_eq!(server.ask("GET", "/v1/sessions/a/text?first_token=0&end_token=1", "", None).status, 401);
    assert_eq!(server.ask("GET", "/page", "", None).status, 401);

    let with = "authorization: Bearer secret\r\n";
    let ask = |method: &str, path: &str, body: Option<&str>| server.ask(method, path, with, body);
    assert_eq!(ask("POST", "/v1/sessions", Some("{\"name\": \"a\"}")).status, 201);
    assert_eq!(
        ask("POST", "/v1/sessions/a/append", Some("{\"text\": \"Anne hoped she had outlived it.\"}")).status,
        200
    );
    let text = |range: &str| ask("GET", &format!("/v1/sessions/a/text{range}"), None);
    let shown = ask("GET", "/v1/sessions/a", None).json();
    assert!(shown["appending"].is_null());
    let tokens = shown["tokens"].as_u64().unwrap();
    let whole = text(&format!("?first_token=0&end_token={tokens}")).json();
    assert_eq!(whole["text"], "Anne hoped she had outlived it.");
    assert_eq!(text("?first_token=2&end_token=2").json()["text"], "");
    for range in [
        "",
        "?first_token=0",
        "?first_token=-1&end_token=1",
        "?first_token=2&end_token=1",
        "?first_token=0&end_token=99999999999999999999",
        "?first_token=0&end_token=4097",
        "?first_token=0&end_token=1&secret=1",
        "?first_token=%ff&end_token=1",
        &format!("?first_token=0&end_token={}", tokens + 1),
    ] {
        let reply = text(range);
        assert!(reply.status == 400 && !reply.body.contains("secret"), "{range}: {reply:?}");
    }
    assert_eq!(ask("GET", "/v1/sessions/b/text?first_token=0&end_token=0", None).status, 404);
}
