//! The page of the example `payments` shows what happened. A headless chromium presses its buttons.
//!
//! The test needs Debian's package `chromium`, so only `./test all` runs it:
//! `cargo test --all-features --test browser -- --ignored`. Cargo builds the example only if no target is named, so run
//! `cargo build --all-features --example payments` first.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

/// The limit of each step. A chromium that starts on a busy machine takes several seconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// The page in a browser, and the server that it came from. Both processes end when this drops.
struct Page {
    browser: Child,
    /// Commands of the debugging protocol go in here, and replies and events come out of `replies`.
    commands: ChildStdin,
    replies: BufReader<ChildStdout>,
    session: Value,
    sent: u64,
    profile: PathBuf,
    _server: Child,
}

/// A line of the page's list of requests.
#[derive(Debug)]
struct Line {
    request: String,
    /// The class, which sets the colour.
    kind: String,
    mark: String,
    milliseconds: u64,
    said: String,
}

impl Page {
    async fn open() -> Self {
        let (server, origin) = serve().await;
        let (mut browser, profile) = chromium();
        let mut page = Self {
            commands: browser.stdin.take().unwrap(),
            replies: BufReader::new(browser.stdout.take().unwrap()),
            browser,
            session: Value::Null,
            sent: 0,
            profile,
            _server: server,
        };
        let target = page
            .command("Target.createTarget", json!({ "url": "about:blank" }))
            .await;
        let target = json!({ "targetId": target["targetId"], "flatten": true });
        let attached = page.command("Target.attachToTarget", target).await;
        page.session = attached["sessionId"].clone();
        page.command("Runtime.enable", json!({})).await;
        page.command("Page.navigate", json!({ "url": origin })).await;
        page.settle().await;
        page
    }

    /// Ends the browser, which may write to its profile until then.
    async fn close(mut self) {
        self.session = Value::Null;
        self.command("Browser.close", json!({})).await;
        let ended = timeout(PATIENCE, self.browser.wait()).await;
        ended.expect("chromium ends in time").unwrap();
    }

    /// Sends a command to the browser and returns its result.
    async fn command(&mut self, method: &str, params: Value) -> Value {
        self.sent += 1;
        let mut command = json!({ "id": self.sent, "method": method, "params": params });
        if self.session.is_string() {
            command["sessionId"] = self.session.clone();
        }
        let mut bytes = command.to_string().into_bytes();
        bytes.push(0);
        self.commands.write_all(&bytes).await.unwrap();
        loop {
            let mut reply = self.read().await;
            if reply["id"] == self.sent {
                assert!(reply["error"].is_null(), "{method}: {reply}");
                return reply["result"].take();
            }
        }
    }

    /// Returns the next reply or event. An error in the page's script fails the test.
    async fn read(&mut self) -> Value {
        let mut bytes = Vec::new();
        let read = timeout(PATIENCE, self.replies.read_until(0, &mut bytes)).await;
        read.expect("chromium replies in time").unwrap();
        assert_eq!(bytes.pop(), Some(0), "chromium has ended");
        let message: Value = serde_json::from_slice(&bytes).unwrap();
        assert_ne!(message["method"], "Runtime.exceptionThrown", "{message}");
        message
    }

    /// Evaluates a JavaScript expression, and awaits it if it is a promise.
    async fn eval(&mut self, expression: &str) -> Value {
        let params = json!({ "expression": expression, "awaitPromise": true, "returnByValue": true });
        let mut result = self.command("Runtime.evaluate", params).await;
        assert!(result["exceptionDetails"].is_null(), "{expression}: {result}");
        result["result"]["value"].take()
    }

    /// Waits until no action of a button runs.
    async fn settle(&mut self) {
        let idle = "new Promise(done => {
            const look = () => document.getElementById('log')?.ariaBusy === 'false' ? done() : setTimeout(look, 10);
            look();
        })";
        self.eval(idle).await;
    }

    /// Presses a button, waits for the end of its action, and returns the new lines of the list, oldest first.
    async fn press(&mut self, button: &str) -> Vec<Line> {
        let before = self.lines().await.len();
        self.start(button).await;
        self.settle().await;
        self.lines().await.split_off(before)
    }

    async fn start(&mut self, button: &str) {
        assert!(self.is_enabled(button).await, "{button} cannot be pressed");
        self.eval(&format!("document.getElementById('{button}').click()")).await;
    }

    async fn is_enabled(&mut self, button: &str) -> bool {
        let enabled = self
            .eval(&format!("!document.getElementById('{button}').disabled"))
            .await;
        enabled.as_bool().unwrap()
    }

    async fn lines(&mut self) -> Vec<Line> {
        let lines = "Array.from(document.querySelectorAll('#log li'), line =>
            Array.from(line.children, part => [part.textContent, part.className])).reverse()";
        let lines = self.eval(lines).await;
        lines.as_array().unwrap().iter().map(Line::new).collect()
    }

    async fn text(&mut self, id: &str) -> String {
        let text = self.eval(&format!("document.getElementById('{id}').textContent")).await;
        text.as_str().unwrap().to_owned()
    }

    /// Checks the number of charges for the order, and that more than one is shown as a failure.
    async fn assert_charges(&mut self, count: usize) {
        assert_eq!(self.text("count").await, count.to_string());
        let class = self.eval("document.getElementById('verdict').className").await;
        let expected = if count > 1 { "verdict failed" } else { "verdict" };
        assert_eq!(class, expected);
    }

    /// Returns the text and background colours of the marks in the legend, by class.
    async fn colours(&mut self) -> Vec<(String, [f64; 3], [f64; 3])> {
        let marks = "Array.from(document.querySelectorAll('#legend .mark'), mark => {
            const { color, backgroundColor } = getComputedStyle(mark);
            return [mark.classList[1], ...[color, backgroundColor].map(rgb => rgb.match(/\\d+/g).map(Number))];
        })";
        let marks = self.eval(marks).await;
        serde_json::from_value(marks).expect("a class and two colours for each mark")
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        drop(self.browser.start_kill());
        drop(std::fs::remove_dir_all(&self.profile));
    }
}

impl Line {
    fn new(parts: &Value) -> Self {
        let text = |part: usize| parts[part][0].as_str().unwrap().to_owned();
        let kind = parts[1][1].as_str().unwrap().strip_prefix("mark ");
        let time = text(2).replace(',', "");
        let milliseconds = time.strip_suffix(" ms").and_then(|time| time.parse().ok());
        Self {
            request: text(0),
            kind: kind.unwrap_or_else(|| panic!("in flight: {parts}")).to_owned(),
            mark: text(1),
            milliseconds: milliseconds.unwrap_or_else(|| panic!("no time: {parts}")),
            said: text(3),
        }
    }
}

/// Starts the example on a free port, and returns it with its origin.
async fn serve() -> (Child, String) {
    let test = std::env::current_exe().unwrap();
    let examples = test.ancestors().nth(2).unwrap().join("examples");
    let binary = examples
        .join("payments")
        .with_extension(std::env::consts::EXE_EXTENSION);
    let server = Command::new(&binary)
        .env("LISTEN", "127.0.0.1:0")
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn();
    let mut server = server.unwrap_or_else(|error| {
        let binary = binary.display();
        panic!("{binary} cannot be run ({error}); `cargo build --all-features --example payments` builds it")
    });
    let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
    let line = timeout(PATIENCE, lines.next_line())
        .await
        .expect("it starts in time")
        .unwrap()
        .unwrap();
    // Read on, because a server whose output nobody reads fails at its next line.
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    (server, line.strip_prefix("listening on ").unwrap().to_owned())
}

/// Starts a chromium without a window, which takes commands on its descriptor 3 and replies on 4. Every name except the
/// machine's own address is unknown to it.
fn chromium() -> (Child, PathBuf) {
    static PROFILES: AtomicUsize = AtomicUsize::new(0);
    let mut found = std::process::Command::new("chromium");
    found.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
    if let Err(error) = found.status() {
        panic!("chromium cannot be run ({error}). Install it, on Debian by `apt-get install chromium`.");
    }
    let number = PROFILES.fetch_add(1, Ordering::Relaxed);
    let profile = format!("chromium-{}-{number}", std::process::id());
    let profile = Path::new(env!("CARGO_TARGET_TMPDIR")).join(profile);
    let browser = Command::new("sh")
        .args([
            "-c",
            "exec chromium \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>&1",
            "chromium",
        ])
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
        ])
        .args(["--disable-background-networking", "--remote-debugging-pipe"])
        .arg("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
        .arg(format!("--user-data-dir={}", profile.display()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn();
    (browser.expect("a shell"), profile)
}

/// The classes and marks of lines.
fn marks(lines: &[Line]) -> Vec<(&str, &str)> {
    lines.iter().map(|line| (&*line.kind, &*line.mark)).collect()
}

#[tokio::test]
#[ignore = "needs chromium; ./test all runs it"]
async fn each_button_shows_what_the_server_did() {
    let mut page = Page::open().await;

    let first = page.press("pay").await;
    assert_eq!(marks(&first), [("executed", "201 executed")]);
    assert!(first[0].milliseconds >= 1_000, "the bank takes a second: {first:?}");
    let again = page.press("pay").await;
    assert_eq!(marks(&again), [("replayed", "201 replayed")]);
    assert_eq!((&again[0].request, &again[0].said), (&first[0].request, &first[0].said));
    page.assert_charges(1).await;

    page.press("new").await;
    page.assert_charges(0).await;
    let mut both = page.press("double").await;
    both.sort_by(|one, other| one.mark.cmp(&other.mark));
    assert_eq!(
        marks(&both),
        [("executed", "201 executed"), ("replayed", "201 replayed")]
    );
    page.assert_charges(1).await;

    page.press("new").await;
    let lost = page.press("lose").await;
    assert_eq!(marks(&lost), [("act", "no response"), ("replayed", "201 replayed")]);
    // The timer of the hang-up starts a moment before the request does.
    assert!(lost[0].milliseconds >= 250, "{lost:?}");
    page.assert_charges(1).await;

    page.press("new").await;
    let other = page.press("other").await;
    assert_eq!(
        marks(&other),
        [("executed", "201 executed"), ("reused", "422 key-reused")]
    );
    page.assert_charges(1).await;

    page.press("new").await;
    let keyless = page.press("keyless").await;
    assert_eq!(
        marks(&keyless),
        [("executed", "201 executed"), ("executed", "201 executed")]
    );
    page.assert_charges(2).await;
    page.close().await;
}

#[tokio::test]
#[ignore = "needs chromium; ./test all runs it"]
async fn a_killed_owner_leaves_409_until_the_operator_resolves_the_key() {
    let mut page = Page::open().await;
    let found = "The bank has charge 1 of € 24.50 for this order.";
    let resolved = "The key stores the response of charge 1.";
    kill_and_resolve(&mut page, "kill-after", found, resolved).await;
    assert_eq!(marks(&page.press("retry").await), [("replayed", "201 replayed")]);
    assert_eq!(page.text("retried").await, "201 replayed");
    page.assert_charges(1).await;

    let (found, resolved) = (
        "The bank has no charge for this order.",
        "The key is free. The next request runs.",
    );
    kill_and_resolve(&mut page, "kill-before", found, resolved).await;
    assert_eq!(marks(&page.press("retry").await), [("executed", "201 executed")]);
    assert_eq!(page.text("retried").await, "201 executed");
    page.assert_charges(1).await;
    assert_eq!(marks(&page.press("pay").await), [("replayed", "201 replayed")]);
    page.close().await;
}

/// Kills the owner of a new order, and takes the operator's steps. Checks that each step needs the one before it.
async fn kill_and_resolve(page: &mut Page, button: &str, found: &str, resolved: &str) {
    let killed = page.press(button).await;
    assert_eq!(marks(&killed), [("act", "no response"), ("act", "409 outcome-unknown")]);
    assert_eq!(killed[0].said, "The server died. The client must retry.");
    assert_eq!(killed[0].request, killed[1].request);
    assert_eq!(marks(&page.press("pay").await), [("act", "409 outcome-unknown")]);

    let mut steps = ["look-up", "resolve", "retry"].iter();
    for (button, output, text) in [("look-up", "found", found), ("resolve", "resolved", resolved)] {
        assert_eq!(steps.next(), Some(&button));
        for later in steps.clone() {
            assert!(!page.is_enabled(later).await, "{later} before {button}");
        }
        assert!(page.press(button).await.is_empty());
        assert_eq!(page.text(output).await, text);
    }
}

#[tokio::test]
#[ignore = "needs chromium; ./test all runs it"]
async fn colours_mean_what_they_say_and_can_be_read_by_day_and_by_night() {
    let mut page = Page::open().await;
    for scheme in ["light", "dark"] {
        let scheme = json!({ "name": "prefers-color-scheme", "value": scheme });
        page.command("Emulation.setEmulatedMedia", json!({ "features": [scheme] }))
            .await;
        let colours = page.colours().await;
        let named: Vec<(&str, &str)> = colours
            .iter()
            .map(|(class, text, _)| (&**class, name_of(*text)))
            .collect();
        let expected = [
            ("executed", "blue"),
            ("replayed", "green"),
            ("reused", "grey"),
            ("act", "amber"),
            ("failed", "red"),
        ];
        assert_eq!(named, expected, "{scheme}: {colours:?}");
        for (class, text, back) in colours {
            let contrast = contrast(text, back);
            assert!(contrast >= 4.5, "{scheme}: {class} has a contrast of {contrast}");
        }
    }
    page.close().await;
}

#[tokio::test]
#[ignore = "needs chromium; ./test all runs it"]
async fn the_page_loads_nothing_from_elsewhere() {
    let mut page = Page::open().await;
    page.press("pay").await;
    let foreign = "performance.getEntriesByType('resource').map(entry => entry.name)
        .filter(name => !name.startsWith(location.origin) && !name.startsWith('data:'))";
    assert_eq!(page.eval(foreign).await, json!([]));
    page.close().await;
}

/// Returns the name of a colour, by its hue and by its saturation.
fn name_of([red, green, blue]: [f64; 3]) -> &'static str {
    let (most, least) = (red.max(green).max(blue), red.min(green).min(blue));
    let range = most - least;
    if range < 25.0 {
        return "grey";
    }
    let sixths = if most == red {
        (green - blue) / range
    } else if most == green {
        (blue - red) / range + 2.0
    } else {
        (red - green) / range + 4.0
    };
    match (sixths * 60.0).rem_euclid(360.0) {
        0.0..20.0 | 340.0..360.0 => "red",
        30.0..50.0 => "amber",
        100.0..170.0 => "green",
        200.0..250.0 => "blue",
        _ => "no name",
    }
}

/// Returns the contrast of two colours, as WCAG 2 defines it.
fn contrast(one: [f64; 3], other: [f64; 3]) -> f64 {
    let luminance = |colour: [f64; 3]| {
        let [red, green, blue] = colour.map(|part| {
            let part = part / 255.0;
            if part <= 0.04045 {
                part / 12.92
            } else {
                ((part + 0.055) / 1.055).powf(2.4)
            }
        });
        0.2126 * red + 0.7152 * green + 0.0722 * blue
    };
    let (one, other) = (luminance(one), luminance(other));
    (one.max(other) + 0.05) / (one.min(other) + 0.05)
}
