//! Plots of a few curves, as SVG.

use anyhow::{Context, anyhow};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::prelude::*;
use std::ops::Range;
use std::path::Path;

const SIZE: (u32, u32) = (800, 480);
/// Told apart by the colour-blind too (Okabe and Ito).
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

/// A curve and its name.
pub struct Curve {
    /// For the legend.
    pub name: String,
    /// Its points, from left to right.
    pub points: Vec<(f64, f64)>,
}

/// What the plot is called and how its axes are.
pub struct Axes<'a> {
    /// Above the plot.
    pub title: &'a str,
    /// Below it; whether equal steps are equal factors.
    pub x: (&'a str, bool),
    /// Beside it.
    pub y: &'a str,
    /// From where to where; left out, so that all points fit.
    pub y_range: Option<Range<f64>>,
}

/// Writes a plot of the curves. Values that are no numbers are left out.
pub fn write(path: &Path, axes: &Axes, curves: &[Curve]) -> anyhow::Result<()> {
    let mut svg = String::new();
    draw(SVGBackend::with_string(&mut svg, SIZE).into_drawing_area(), axes, curves)
        .map_err(|error| anyhow!("cannot draw the plot: {error}"))?;
    crate::files::write(path, svg.as_bytes()).with_context(|| format!("{}: cannot write it", path.display()))
}

fn draw(area: Area, axes: &Axes, curves: &[Curve]) -> Drawn {
    area.fill(&WHITE)?;
    let points = || curves.iter().flat_map(|curve| &curve.points).filter(|(x, y)| x.is_finite() && y.is_finite());
    let x = bounds(points().map(|point| point.0));
    let y = axes.y_range.clone().unwrap_or_else(|| {
        let Range { start, end } = bounds(points().map(|point| point.1));
        let margin = 0.05 * (end - start);
        start - margin..end + margin
    });
    if axes.x.1 && x.start > 0. {
        curves_on(&area, axes, x.log_scale(), y, curves)
    } else {
        curves_on(&area, axes, x, y, curves)
    }?;
    area.present()?;
    Ok(())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

fn curves_on<X>(area: &Area, axes: &Axes, x: X, y: Range<f64>, curves: &[Curve]) -> Drawn
where
    X: AsRangedCoord<Value = f64>,
    X::CoordDescType: ValueFormatter<f64> + Ranged<ValueType = f64>,
{
    let mut chart = ChartBuilder::on(area)
        .caption(axes.title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .x_desc(axes.x.0)
        .y_desc(axes.y)
        .x_label_formatter(&|x| short(*x))
        .light_line_style(WHITE)
        .bold_line_style(BLACK.mix(0.12))
        .draw()?;
    for (curve, colour) in curves.iter().zip(COLOURS.iter().cycle()) {
        let points: Vec<_> = curve.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect();
        // Many points are a line of their own.
        if points.len() <= 64 {
            chart.draw_series(points.iter().map(|&point| Circle::new(point, 3, colour.filled())))?;
        }
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
            .label(curve.name.as_str())
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    if curves.len() > 1 {
        chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.3)).draw()?;
    }
    Ok(())
}

/// From the smallest to the largest, and never of width 0.
fn bounds(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
    match () {
        () if low < high => low..high,
        () if low.is_finite() => low - 0.5 * low.abs().max(1.)..low + 0.5 * low.abs().max(1.),
        () => 0. ..1.,
    }
}

/// 500, 32k, 1M.
fn short(x: f64) -> String {
    let (scaled, unit) = match x.abs() {
        size if size >= 1e6 => (x / 1e6, "M"),
        size if size >= 1e4 => (x / 1e3, "k"),
        _ => (x, ""),
    };
    let digits = format!("{scaled:.2}");
    format!("{}{unit}", digits.trim_end_matches('0').trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(log: bool, points: &[(f64, f64)]) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plot.svg");
        let curve = |name: &str| Curve { name: name.into(), points: points.to_vec() };
        let axes = Axes { title: "Found", x: ("tokens", log), y: "share", y_range: None };
        write(&path, &axes, &[curve("retrieval"), curve("window")]).unwrap();
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn a_plot_names_what_it_shows() {
        let svg = plot(true, &[(500., 1.), (32_000., 0.5), (1e6, f64::NAN)]);
        for text in ["Found", "tokens", "share", "retrieval", "window", "<svg", "</svg>"] {
            assert!(svg.contains(text), "{text}: {svg}");
        }
        // Two curves of two points each.
        assert_eq!(svg.matches("<circle").count(), 4);
    }

    #[test]
    fn few_points_and_equal_ones_are_no_trouble() {
        for points in [&[][..], &[(0., 0.)], &[(2., 3.), (2., 3.)], &[(0., f64::INFINITY)]] {
            for log in [false, true] {
                assert!(plot(log, points).contains("</svg>"));
            }
        }
    }

    #[test]
    fn large_numbers_are_short() {
        assert_eq!([0., 0.25, 500., 9_999., 32_000., 1.5e6].map(short), ["0", "0.25", "500", "9999", "32k", "1.5M"]);
    }
}
