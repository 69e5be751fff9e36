//! Tables as Markdown and as comma-separated values.

/// Columns with names, rows of text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    columns: Vec<String>,
    rows: Vec<Vec<String>>,
    /// Columns that hold text and stand to the left; all others are numbers.
    num_text_columns: usize,
}

impl Table {
    /// Without rows; the first `num_text_columns` columns hold text.
    #[must_use]
    pub fn new(columns: &[&str], num_text_columns: usize) -> Self {
        Self {
            columns: columns.iter().map(ToString::to_string).collect(),
            rows: Vec::new(),
            num_text_columns,
        }
    }

    /// Adds a row; cells that are missing are empty.
    pub fn push(&mut self, mut row: Vec<String>) {
        row.resize(self.columns.len(), String::new());
        self.rows.push(row);
    }

    /// Names of the columns.
    #[must_use]
    pub fn columns(&self) -> &[String] {
        &self.columns
    }

    /// The rows.
    #[must_use]
    pub fn rows(&self) -> &[Vec<String>] {
        &self.rows
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
        let all: Vec<Vec<String>> = std::iter::once(&self.columns)
            .chain(&self.rows)
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

    /// As comma-separated values (RFC 4180).
    #[must_use]
    pub fn csv(&self) -> String {
        let cell = |cell: &String| {
            if cell.contains([',', '"', '\n']) {
                format!("\"{}\"", cell.replace('"', "\"\""))
            } else {
                cell.clone()
            }
        };
        let line = |row: &Vec<String>| format!("{}\n", row.iter().map(cell).collect::<Vec<_>>().join(","));
        std::iter::once(&self.columns).chain(&self.rows).map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::Table;

    #[test]
    fn tables_are_written_in_both_forms() {
        let mut table = Table::new(&["name", "tok/s"], 1);
        table.push(vec!["a|b".into(), "1.5".into()]);
        table.push(vec!["say \"x\", y".into(), "200.0".into()]);
        table.push(vec!["z".into()]);
        assert_eq!(
            table.markdown(),
            "| name       | tok/s |\n| ---------- | ----: |\n| a\\|b       |   1.5 |\n| say \"x\", y | 200.0 |\n| z          |       |\n"
        );
        assert_eq!(table.csv(), "name,tok/s\na|b,1.5\n\"say \"\"x\"\", y\",200.0\nz,\n");
    }
}
