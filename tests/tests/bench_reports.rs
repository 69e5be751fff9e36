//! The pages of `ingle bench`, in a real browser: everything is drawn, on a phone too, and the console is silent.

use std::path::Path;
use std::process::Command;

use ingle_tests::{Launch, TinyModel, ingle};
use serde_json::{Value, json};

use crate::bench::{Reply, done, models, scripted};

/// A browser that is installed.
fn browser() -> Option<&'static str> {
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let found = names.into_iter().find(|name| Command::new(name).arg("--version").output().is_ok());
    if found.is_none() {
        println!("SKIPPED: a report in a browser, because none of {names:?} is installed");
    }
    found
}

/// Opens `report` in `browser` as wide as a phone and as a desk, and looks for `plots` and `bars`.
fn look(browser: &str, report: &str, folder: &Path, plots: usize, bars: usize) {
    for width in [390, 1100] {
        // The report in a frame of the wanted width, and a script outside it that looks in.
        let frame = report.replace('&', "&amp;").replace('"', "&quot;");
        let outer = format!(
            "<!doctype html><body style=\"margin:0\"><iframe id=\"f\" style=\"width:{width}px;height:900px;border:0\" srcdoc=\"{frame}\"></iframe><pre id=\"found\"></pre><script>{LOOK}</script>"
        );
        let file = folder.join(format!("outer-{width}.html"));
        std::fs::write(&file, outer).expect("written");
        let output = Command::new(browser)
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,1000"])
            .arg("--enable-logging=stderr")
            .arg(format!("--user-data-dir={}", folder.join(format!("profile-{width}")).display()))
            .args(["--virtual-time-budget=10000", "--dump-dom"])
            .arg(format!("file://{}", file.display()))
            .output()
            .expect("the browser runs");
        let dom = String::from_utf8_lossy(&output.stdout);
        let log = String::from_utf8_lossy(&output.stderr);
        let found = dom.split_once("<pre id=\"found\">").and_then(|(_, rest)| rest.split_once("</pre>"));
        let found: Value = found
            .and_then(|(text, _)| serde_json::from_str(text).ok())
            .unwrap_or_else(|| panic!("the script found nothing: {log}"));
        assert_eq!(found["plots"], plots, "plots that are seen: {found}");
        assert_eq!(found["empty"], 0, "plots without a line: {found}");
        assert_eq!(found["bars"], bars, "bars that are seen: {found}");
        assert!(found["width"].as_f64() <= found["window"].as_f64(), "wider than the screen: {found}");
        assert!(found["smallest_text"].as_f64() >= Some(9.0), "text too small to read: {found}");
        assert_eq!(found["errors"], json!([]));
        assert!(!log.contains("CONSOLE"), "{log}");
    }
}

#[tokio::test]
async fn the_report_of_a_load_test_is_read_in_a_browser() {
    let Some(browser) = browser() else { return };
    let server = Launch::tiny().start().await;
    let folder = tempfile::tempdir().expect("a folder");
    let page = folder.path().join("report.html");
    let url = server.url("");
    let args =
        ["bench", "serve", "--url", &url, "-c", "1,3", "-n", "4", "--input-len", "12", "--output-len", "6"];
    done(&ingle(&[&args[..], &["-q", "--html", page.to_str().expect("plain")]].concat()));
    look(browser, &std::fs::read_to_string(&page).expect("the page is there"), folder.path(), 5, 0);
}

#[test]
fn the_report_of_a_model_is_read_in_a_browser() {
    let model = TinyModel::llama();
    let page = model.path().join("report.html");
    let args =
        ["bench", "model", model.arg(), "-p", "16,32", "-n", "4", "--pg", "8,2", "-r", "2", "-q", "--html"];
    done(&ingle(&[&args[..], &[page.to_str().expect("plain")]].concat()));
    let report = std::fs::read_to_string(&page).expect("the page is there");
    for words in ["pp16", "tg4", "pp8+tg2", "Share of the memory", "Share of the arithmetic"] {
        assert!(report.contains(words), "{words}: {report}");
    }
    // Four cases, each with its speed and two shares.
    if let Some(browser) = browser() {
        look(browser, &report, model.path(), 0, 12);
    }
}

#[test]
fn the_report_of_an_embedding_server_is_read_in_a_browser() {
    let url = scripted(|_, path, body| match path {
        "/v1/models" => models(),
        "/v1/embeddings" => {
            let count = body["input"].as_array().map_or(0, Vec::len);
            Reply::Json(200, json!({"data": vec![json!({"embedding": [0.5, 0.25]}); count]}))
        }
        _ => Reply::Json(404, json!({})),
    });
    let folder = tempfile::tempdir().expect("a folder");
    let page = folder.path().join("report.html");
    let args = ["bench", "embed", "--url", &url, "--lengths", "4,8", "-b", "1,5", "-n", "6", "-q", "--html"];
    done(&ingle(&[&args[..], &[page.to_str().expect("plain")]].concat()));
    let report = std::fs::read_to_string(&page).expect("the page is there");
    assert!(report.contains("Texts of 8 tokens"), "{report}");
    if let Some(browser) = browser() {
        look(browser, &report, folder.path(), 1, 4);
    }
}

#[test]
fn starts_are_reported_and_compared() {
    let model = TinyModel::llama();
    let (page, file) = (model.path().join("report.html"), model.path().join("start.json"));
    let (page, file) = (page.to_str().expect("plain"), file.to_str().expect("plain"));
    let flags = ["-r", "2", "-q", "--html", page, "--output", file, "--", "--kv-cache-memory", "16"];
    done(&ingle(&[&["bench", "startup", model.arg()][..], &flags].concat()));
    let report = std::fs::read_to_string(page).expect("the page is there");
    assert!(report.contains("exec to first token"), "{report}");
    if let Some(browser) = browser() {
        look(browser, &report, model.path(), 0, 6);
    }
    let same = ingle(&["bench", "--compare", file, file, "--fail-above", "5%"]);
    assert!(done(&same).stdout.contains("ready_ms"), "{same:?}");
    // The same starts, each as if it had taken far longer than the longest.
    let mut slow: Value = serde_json::from_slice(&std::fs::read(file).expect("written")).expect("JSON");
    let starts = slow["points"].as_array_mut().expect("starts");
    let longest = starts.iter().filter_map(|start| start["ready_ms"].as_f64()).fold(0.0, f64::max);
    for start in starts {
        start["ready_ms"] = json!(longest * 100.0);
    }
    let slower = model.path().join("slower.json");
    std::fs::write(&slower, slow.to_string()).expect("written");
    let worse = ingle(&["bench", "--compare", file, slower.to_str().expect("plain"), "--fail-above", "5%"]);
    assert_eq!(worse.code, Some(1), "{worse:?}");
    assert!(worse.error().contains("1 of 6 figures"), "{worse:?}");
}

/// Runs in the browser beside the report.
const LOOK: &str = r#"
const errors = [];
window.onerror = (message) => errors.push(String(message));
const frame = document.getElementById("f");
frame.onload = () => {
  const inner = frame.contentDocument;
  const seen = [...inner.querySelectorAll("svg")].filter((svg) => svg.getBoundingClientRect().width > 100);
  const scale = (svg) => svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  const lines = (svg) => [...svg.querySelectorAll("polyline")].filter((line) => line.getTotalLength() > 5).length;
  const bars = [...inner.querySelectorAll(".bar")];
  const texts = seen.flatMap((svg) => [...svg.querySelectorAll("text")].map((text) => parseFloat(getComputedStyle(text).fontSize) * scale(svg)));
  const words = bars.flatMap((bar) => [...bar.querySelectorAll("span:first-child, b")].map((text) => parseFloat(getComputedStyle(text).fontSize)));
  const drawn = (bar) => {
    const box = bar.querySelector("i").getBoundingClientRect();
    return box.width >= 1 && box.height >= 5 && bar.querySelector(".track").getBoundingClientRect().width > 80;
  };
  document.getElementById("found").textContent = JSON.stringify({
    plots: seen.length,
    empty: seen.filter((svg) => lines(svg) === 0).length,
    bars: bars.filter(drawn).length,
    width: inner.documentElement.scrollWidth,
    window: frame.contentWindow.innerWidth,
    smallest_text: Math.min(...texts, ...words),
    errors,
  });
};
"#;
