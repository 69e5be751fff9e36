//! A page of tables, bars and plots: no script, nothing fetched, light and dark, wide and narrow.

use std::fmt::Write;

use serde_json::Value;

use super::plot::{COLORS, Plot};
use super::table::Table;
use crate::environment::Environment;

const STYLE: &str = include_str!("style.css");

/// A page in the making.
pub(super) struct Page(String);

/// A bar of a figure.
#[derive(Debug, Clone)]
pub(super) struct Bar {
    pub(super) label: String,
    pub(super) value: f64,
    /// What stands behind it: the value with its unit, perhaps its spread.
    pub(super) text: String,
    pub(super) color: usize,
}

impl Page {
    /// Its head, a heading and the machine.
    pub(super) fn new(title: &str, environment: &Environment) -> Self {
        let mut page = String::new();
        page.push_str("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n");
        page.push_str("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n");
        // An icon of its own: a browser would ask for one otherwise.
        let _ = writeln!(
            page,
            "<link rel=\"icon\" href=\"data:,\"><title>{}</title><style>\n{STYLE}",
            escape(title)
        );
        for (idx, (r, g, b)) in COLORS.iter().enumerate() {
            let _ = writeln!(page, ".c{idx}{{background:rgb({r},{g},{b})}}");
        }
        let _ = writeln!(page, "</style></head><body><main><h1>{}</h1>", escape(title));
        let _ = writeln!(page, "<p>{}</p>", escape(&environment.line()));
        Self(page)
    }

    /// A table that scrolls by itself where the screen is narrow.
    pub(super) fn table(&mut self, table: &Table) {
        let row = |cells: &[String], tag: &str| {
            let cells = cells.iter().enumerate().map(|(idx, cell)| {
                let class = if table.is_text(idx) { "" } else { " class=\"n\"" };
                format!("<{tag}{class}>{}</{tag}>", escape(cell))
            });
            format!("<tr>{}</tr>\n", cells.collect::<String>())
        };
        let body: String = table.shown().iter().map(|cells| row(cells, "td")).collect();
        let head = row(&table.headings(), "th");
        let _ = writeln!(
            self.0,
            "<div class=\"scroll\"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>"
        );
    }

    /// What the colours mean, in their order.
    pub(super) fn legend(&mut self, names: impl IntoIterator<Item = String>) {
        self.0.push_str("<div class=\"legend\">");
        for (idx, name) in names.into_iter().enumerate() {
            let _ = write!(self.0, "<span><i class=\"c{}\"></i>{}</span>", idx % COLORS.len(), escape(&name));
        }
        self.0.push_str("</div>\n");
    }

    /// A plot twice: for wide and for narrow screens, of which the style sheet shows one.
    ///
    /// # Errors
    /// If it cannot be drawn.
    pub(super) fn plot(&mut self, heading: &str, remark: &str, plot: &Plot) -> anyhow::Result<()> {
        let (Some(wide), Some(narrow)) = (plot.svg((900, 360))?, plot.svg((360, 300))?) else {
            return Ok(());
        };
        let _ = writeln!(self.0, "<figure><h2>{heading}</h2><p>{remark}</p>");
        for (class, svg) in [("wide", wide), ("narrow", narrow)] {
            let sized = svg.find("<svg").map_or(svg.as_str(), |begin| &svg[begin..]);
            let (width, height) = if class == "wide" { (900, 360) } else { (360, 300) };
            // The library gives a size in pixels; the page wants one that fits.
            let head = format!("<svg width=\"{width}\" height=\"{height}\"");
            let sized = sized.replacen(
                &head,
                &format!("<svg class=\"{class}\" role=\"img\" aria-label=\"{heading}\""),
                1,
            );
            self.0.push_str(&sized);
        }
        self.0.push_str("</figure>\n");
        Ok(())
    }

    /// Bars whose full length is `most`, or the largest value; nothing without bars.
    pub(super) fn bars(&mut self, heading: &str, remark: &str, most: Option<f64>, bars: &[Bar]) {
        let most = most.unwrap_or_else(|| bars.iter().map(|bar| bar.value).fold(0.0, f64::max));
        if bars.is_empty() || most <= 0.0 {
            return;
        }
        let _ = writeln!(self.0, "<figure><h2>{}</h2><p>{}</p>", escape(heading), escape(remark));
        for bar in bars {
            let width = (100.0 * bar.value / most).clamp(0.0, 100.0);
            let _ = writeln!(
                self.0,
                "<div class=\"bar\"><span>{}</span><span class=\"track\"><i class=\"c{}\" style=\"width:{width:.1}%\"></i></span><b>{}</b></div>",
                escape(&bar.label),
                bar.color % COLORS.len(),
                escape(&bar.text),
            );
        }
        self.0.push_str("</figure>\n");
    }

    /// What a reader should know besides.
    pub(super) fn remarks(&mut self, remarks: &[String]) {
        self.0.push_str("<h2>Remarks</h2><ul>");
        for remark in remarks {
            let _ = write!(self.0, "<li>{}</li>", escape(remark));
        }
        self.0.push_str("</ul>\n");
    }

    /// The whole page, with how it was made and `details` that open on demand.
    ///
    /// # Errors
    /// If a detail cannot be written as JSON.
    pub(super) fn end(
        mut self,
        environment: &Environment,
        details: &[(&str, Value)],
    ) -> anyhow::Result<String> {
        let _ = writeln!(
            self.0,
            "<h2>How it was made</h2>\n<pre>{}</pre>",
            escape(&environment.command.join(" "))
        );
        for (name, value) in details {
            let text = escape(&serde_json::to_string_pretty(value)?);
            let _ = writeln!(self.0, "<details><summary>{name}</summary><pre>{text}</pre></details>");
        }
        self.0.push_str("</main></body></html>\n");
        Ok(self.0)
    }
}

/// `text` as it may stand in HTML.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
