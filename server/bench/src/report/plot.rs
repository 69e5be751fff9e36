//! Line plots as SVG, in colours that the page's style sheet replaces, so that one picture serves light and dark.

use std::ops::Range;

use anyhow::anyhow;
use plotters::coord::Shift;
use plotters::prelude::*;

/// A line of a plot.
#[derive(Debug, Clone)]
pub(super) struct Series {
    pub(super) color: usize,
    pub(super) points: Vec<(f64, f64)>,
    /// Marks at the points.
    pub(super) marks: bool,
}

/// A plot to be drawn.
#[derive(Debug, Clone)]
pub(super) struct Plot {
    pub(super) x_label: &'static str,
    pub(super) y_label: &'static str,
    /// A logarithmic x axis.
    pub(super) log_x: bool,
    /// The y axis ends here, if anywhere in particular.
    pub(super) y_max: Option<f64>,
    pub(super) series: Vec<Series>,
}

/// Stands for the colour of text and axes.
const INK: RGBColor = RGBColor(1, 1, 1);
/// Stands for the colour of the grid.
const GRID: RGBColor = RGBColor(2, 2, 2);

/// Colours that can be told apart on white and on black, also by most people who see fewer colours.
pub(super) const COLORS: [(u8, u8, u8); 8] = [
    (47, 126, 216),
    (230, 126, 34),
    (39, 160, 110),
    (192, 80, 190),
    (214, 69, 65),
    (120, 120, 130),
    (160, 130, 30),
    (30, 160, 180),
];

/// Number `idx` of the colours, which repeat.
pub(super) fn color(idx: usize) -> RGBColor {
    let (r, g, b) = COLORS[idx % COLORS.len()];
    RGBColor(r, g, b)
}

impl Plot {
    /// The plot as SVG of `width` x `height`; `None` if there is nothing to draw.
    ///
    /// # Errors
    /// If the plot library fails.
    pub(super) fn svg(&self, (width, height): (u32, u32)) -> anyhow::Result<Option<String>> {
        let all = || self.series.iter().flat_map(|series| &series.points);
        if all().next().is_none() {
            return Ok(None);
        }
        let bounds = |of: fn(&(f64, f64)) -> f64| {
            all().map(of).fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
                (low.min(value), high.max(value))
            })
        };
        let (x_low, x_high) = bounds(|point| point.0);
        let (_, y_high) = bounds(|point| point.1);
        let y = 0.0..self.y_max.unwrap_or(y_high * 1.08).max(1e-9);
        let mut text = String::new();
        {
            let area = SVGBackend::with_string(&mut text, (width, height)).into_drawing_area();
            let drawn = if self.log_x {
                let low = x_low.max(1e-3);
                self.draw_log(&area, low * 0.9..(x_high * 1.1).max(low * 1.5), y)
            } else {
                self.draw_linear(&area, 0.0..(x_high * 1.05).max(1e-9), y)
            };
            drawn.map_err(|error| anyhow!("a plot could not be drawn: {error}"))?;
            area.present().map_err(|error| anyhow!("a plot could not be drawn: {error}"))?;
        }
        Ok(Some(text))
    }
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type DrawResult<'a> = Result<(), Box<dyn std::error::Error + 'a>>;

/// The two kinds of axes have different types: the same lines are needed for each.
macro_rules! draw {
    ($self:ident, $area:ident, $x:expr, $y:ident) => {{
        let narrow = $area.dim_in_pixel().0 < 500;
        let size = 14;
        let mut chart = ChartBuilder::on($area)
            .margin(6)
            .margin_right(16)
            .x_label_area_size(44)
            .y_label_area_size(if narrow { 56 } else { 66 })
            .build_cartesian_2d($x, $y)?;
        let style = ("sans-serif", size).into_font().color(&INK);
        chart
            .configure_mesh()
            .x_labels(if narrow { 4 } else { 8 })
            .y_labels(6)
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .axis_style(INK)
            .label_style(style.clone())
            .axis_desc_style(style)
            .x_desc($self.x_label)
            .y_desc($self.y_label)
            .x_label_formatter(&|value| number(*value))
            .y_label_formatter(&|value| number(*value))
            .draw()?;
        for series in &$self.series {
            let color = color(series.color);
            chart.draw_series(LineSeries::new(series.points.iter().copied(), color.stroke_width(2)))?;
            if series.marks {
                chart
                    .draw_series(series.points.iter().map(|point| Circle::new(*point, 4, color.filled())))?;
            }
        }
        Ok(())
    }};
}

impl Plot {
    fn draw_linear<'a>(&self, area: &Area<'a>, x: Range<f64>, y: Range<f64>) -> DrawResult<'a> {
        draw!(self, area, x, y)
    }

    fn draw_log<'a>(&self, area: &Area<'a>, x: Range<f64>, y: Range<f64>) -> DrawResult<'a> {
        draw!(self, area, x.log_scale(), y)
    }
}

/// Short: three digits are read, more are noise.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 10_000.0 => format!("{:.0}k", value / 1000.0),
        size if size >= 100.0 || size == 0.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}").trim_end_matches(".0").to_owned(),
        _ => format!("{value:.2}").trim_end_matches('0').trim_end_matches('.').to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(points: &[(f64, f64)], log_x: bool) -> Plot {
        let series = vec![Series { color: 9, points: points.to_vec(), marks: true }];
        Plot { x_label: "x of it", y_label: "y of it", log_x, y_max: None, series }
    }

    #[test]
    fn a_plot_has_its_line_its_marks_and_its_labels() {
        for log_x in [false, true] {
            let svg = plot(&[(1.0, 2.0), (10.0, 4.0), (100.0, 3.0)], log_x).svg((380, 300)).unwrap().unwrap();
            assert_eq!(svg.matches("<circle").count(), 3, "{svg}");
            assert!(svg.contains("<polyline") && svg.contains("x of it") && svg.contains("#E67E22"), "{svg}");
        }
        assert_eq!(plot(&[], false).svg((380, 300)).unwrap(), None);
        // One point, or none but zeros, is a plot too.
        assert!(plot(&[(0.0, 0.0)], true).svg((380, 300)).unwrap().is_some());
        assert!(plot(&[(0.0, 0.0)], false).svg((380, 300)).unwrap().is_some());
    }

    #[test]
    fn numbers_are_short() {
        for (value, wanted) in [
            (0.0, "0"),
            (0.25, "0.25"),
            (0.5, "0.5"),
            (12.0, "12"),
            (12.5, "12.5"),
            (1234.0, "1234"),
            (56_000.0, "56k"),
        ] {
            assert_eq!(number(value), wanted);
        }
    }
}
