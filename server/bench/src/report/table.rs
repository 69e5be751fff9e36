//! Tables as Markdown and as comma-separated values.

/// What stands in a cell: rounded for people, whole for programs.
#[derive(Debug, Clone, PartialEq)]
pub enum Cell {
    /// Words.
    Text(String),
    /// A number, and its digits behind the point for people.
    Number(f64, usize),
    /// A share of 1, and the digits of its percents for people.
    Share(f64, usize),
    /// A change as a share of 1, in percent with its sign for people.
    Gain(f64),
    /// A large number, in millions for people.
    Millions(f64),
    /// There is no value.
    Nothing,
}

impl Cell {
    /// Words.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    /// A count.
    #[must_use]
    pub fn count(count: usize) -> Self {
        Self::Number(count as f64, 0)
    }

    /// A number that may be missing.
    #[must_use]
    pub fn maybe(value: Option<f64>, digits: usize) -> Self {
        value.map_or(Self::Nothing, |value| Self::Number(value, digits))
    }

    fn shown(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Number(value, digits) => format!("{value:.digits$}"),
            Self::Share(value, digits) => format!("{:.digits$}%", value * 100.0),
            Self::Gain(value) => format!("{:+.1}%", value * 100.0),
            Self::Millions(value) => format!("{:.2} M", value / 1e6),
            Self::Nothing => "-".to_owned(),
        }
    }

    fn raw(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Number(value, _) | Self::Share(value, _) | Self::Gain(value) | Self::Millions(value)
                if value.is_finite() =>
            {
                value.to_string()
            }
            _ => String::new(),
        }
    }
}

/// Columns with names, rows of cells.
#[derive(Debug, Clone, PartialEq)]
pub struct Table {
    /// Heading for people, name for programs.
    columns: Vec<(String, String)>,
    rows: Vec<Vec<Cell>>,
    /// Columns that hold text and stand to the left; all others are numbers.
    num_text_columns: usize,
}

impl Table {
    /// Without rows. A column has a heading for people and a name for programs, which no other column has; the first
    /// `num_text_columns` columns hold text.
    #[must_use]
    pub fn new(columns: &[(&str, &str)], num_text_columns: usize) -> Self {
        Self {
            columns: columns.iter().map(|(shown, name)| ((*shown).to_owned(), (*name).to_owned())).collect(),
            rows: Vec::new(),
            num_text_columns,
        }
    }

    /// Adds a row; cells that are missing have no value.
    pub fn push(&mut self, mut row: Vec<Cell>) {
        row.resize(self.columns.len(), Cell::Nothing);
        self.rows.push(row);
    }

    /// Headings of the columns.
    #[must_use]
    pub fn headings(&self) -> Vec<String> {
        self.columns.iter().map(|(shown, _)| shown.clone()).collect()
    }

    /// The rows, as people read them.
    #[must_use]
    pub fn shown(&self) -> Vec<Vec<String>> {
        self.rows.iter().map(|row| row.iter().map(Cell::shown).collect()).collect()
    }

    /// Whether column `idx` holds text.
    #[must_use]
    pub fn is_text(&self, idx: usize) -> bool {
        idx < self.num_text_columns
    }

    /// As Markdown, columns aligned so that it reads well in a terminal too.
    #[must_use]
    pub fn markdown(&self) -> String {
        let escaped = |cell: &String| cell.replace('|', "\\|").replace('\n', " ");
        let all: Vec<Vec<String>> = std::iter::once(&self.headings())
            .chain(&self.shown())
            .map(|row| row.iter().map(escaped).collect())
            .collect();
        let width = |idx: usize| all.iter().map(|row| row[idx].chars().count()).max().unwrap_or(0).max(3);
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let line = |row: &Vec<String>| {
            let cells = row.iter().zip(&widths).enumerate().map(|(idx, (cell, width))| {
                if self.is_text(idx) { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
            });
            format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "))
        };
        let rule = widths.iter().enumerate().map(|(idx, width)| {
            if self.is_text(idx) { "-".repeat(*width) } else { format!("{}:", "-".repeat(width - 1)) }
        });
        let mut text = line(&all[0]);
        text.push_str(&format!("| {} |\n", rule.collect::<Vec<_>>().join(" | ")));
        text.extend(all[1..].iter().map(line));
        text
    }

    /// As comma-separated values (RFC 4180): names that are unique, numbers that are not rounded, shares of 1.
    #[must_use]
    pub fn csv(&self) -> String {
        let quoted = |cell: String| {
            if cell.contains([',', '"', '\n']) { format!("\"{}\"", cell.replace('"', "\"\"")) } else { cell }
        };
        let line =
            |cells: Vec<String>| format!("{}\n", cells.into_iter().map(quoted).collect::<Vec<_>>().join(","));
        let mut text = line(self.columns.iter().map(|(_, name)| name.clone()).collect());
        text.extend(self.rows.iter().map(|row| line(row.iter().map(Cell::raw).collect())));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::{Cell, Table};

    #[test]
    fn tables_are_written_in_both_forms() {
        let mut table = Table::new(&[("name", "name"), ("tok/s", "avg_ts"), ("of limit", "share")], 1);
        table.push(vec![Cell::text("a|b"), Cell::Number(1.2345, 1), Cell::Share(0.123, 0)]);
        table.push(vec![Cell::text("say \"x\", y"), Cell::Number(200.0, 1), Cell::Number(f64::NAN, 0)]);
        table.push(vec![Cell::text("z")]);
        assert_eq!(
            table.markdown(),
            "| name       | tok/s | of limit |\n| ---------- | ----: | -------: |\n| a\\|b       |   1.2 |      12% |\n| say \"x\", y | 200.0 |      NaN |\n| z          |     - |        - |\n"
        );
        assert_eq!(table.csv(), "name,avg_ts,share\na|b,1.2345,0.123\n\"say \"\"x\"\", y\",200,\nz,,\n");
    }
}
