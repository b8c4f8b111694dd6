//! Lines in a coordinate system, as SVG.

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 520.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 170.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 60.0;
/// Okabe and Ito's colours, which most people tell apart.
const COLOURS: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000"];
/// Ticks of an axis at most.
const MAX_TICKS: f64 = 9.0;

/// A line with its name.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) name: String,
    /// Completions and reward.
    pub(super) points: Vec<(f64, f64)>,
    pub(super) is_dashed: bool,
}

/// The range of an axis, and what is marked on it.
struct Axis {
    first: f64,
    step: f64,
    num_ticks: usize,
}

impl Axis {
    /// The smallest range of round numbers that holds all values.
    fn new(values: impl Iterator<Item = f64> + Clone) -> Self {
        let (least, most) =
            values.fold((f64::MAX, f64::MIN), |(least, most), value| (least.min(value), most.max(value)));
        let rough = (most - least).max(1e-9) / MAX_TICKS;
        let power = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|step| *step >= rough);
        let step = step.unwrap_or(10.0 * power);
        let first = (least / step).floor() * step;
        let num_ticks = ((most - first) / step).ceil() as usize + 1;
        Self { first, step, num_ticks }
    }

    fn ticks(&self) -> impl Iterator<Item = f64> + '_ {
        (0..self.num_ticks).map(|index| self.first + index as f64 * self.step)
    }

    /// Where a value lies, from 0 to 1.
    fn share(&self, value: f64) -> f64 {
        (value - self.first) / (self.step * (self.num_ticks - 1).max(1) as f64)
    }
}

/// A drawing of all lines, in the order of the legend. Names are plain text without `<` and `&`.
pub(super) fn svg(lines: &[Line], title: &str) -> String {
    let points = || lines.iter().flat_map(|line| &line.points);
    let (across, up) =
        (Axis::new(points().map(|point| point.0).chain([0.0])), Axis::new(points().map(|point| point.1)));
    let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
    let x = |value: f64| LEFT + across.share(value) * (right - LEFT);
    let y = |value: f64| bottom - up.share(value) * (bottom - TOP);
    let mut parts = vec![
        format!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">"#
        ),
        format!(r#"<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>"#),
        text((LEFT, 28.0), "start", 16, title),
    ];
    for tick in across.ticks() {
        parts.push(rule((x(tick), TOP), (x(tick), bottom)));
        parts.push(text((x(tick), bottom + 20.0), "middle", 13, &format!("{tick}")));
    }
    for tick in up.ticks() {
        parts.push(rule((LEFT, y(tick)), (right, y(tick))));
        parts.push(text((LEFT - 8.0, y(tick) + 4.0), "end", 13, &format!("{tick:.2}")));
    }
    parts.push(text(((LEFT + right) / 2.0, HEIGHT - 14.0), "middle", 14, "completions"));
    let middle = f64::midpoint(TOP, bottom);
    parts.push(format!(
        r#"<text transform="translate(20 {middle:.1}) rotate(-90)" text-anchor="middle" font-size="14">reward</text>"#
    ));
    for (index, line) in lines.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let dashes = if line.is_dashed { r#" stroke-dasharray="7 4""# } else { "" };
        let style = format!(r#"fill="none" stroke="{colour}" stroke-width="2"{dashes}"#);
        let path: Vec<String> =
            line.points.iter().map(|point| format!("{:.1},{:.1}", x(point.0), y(point.1))).collect();
        parts.push(format!(r#"<polyline points="{}" {style}/>"#, path.join(" ")));
        let height = TOP + 14.0 + 22.0 * index as f64;
        let (from, to) = (right + 14.0, right + 46.0);
        parts.push(format!(r#"<polyline points="{from:.1},{height:.1} {to:.1},{height:.1}" {style}/>"#));
        parts.push(text((to + 8.0, height + 4.0), "start", 13, &line.name));
    }
    parts.push("</svg>\n".to_owned());
    parts.join("\n")
}

fn rule((x1, y1): (f64, f64), (x2, y2): (f64, f64)) -> String {
    format!(r##"<line x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}" stroke="#dddddd"/>"##)
}

fn text((x, y): (f64, f64), anchor: &str, size: u32, content: &str) -> String {
    format!(r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}" font-size="{size}">{content}</text>"#)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_are_round_and_hold_everything() {
        for (values, first, step, last) in
            [([0.0, 19200.0], 0.0, 5000.0, 20000.0), ([0.48, 1.03], 0.4, 0.1, 1.1), ([-3.0, 4.0], -3.0, 1.0, 4.0)]
        {
            let axis = Axis::new(values.into_iter());
            let ticks: Vec<f64> = axis.ticks().collect();
            let found = (ticks[0], axis.step, ticks[ticks.len() - 1]);
            for (found, expect) in [(found.0, first), (found.1, step), (found.2, last)] {
                assert!((found - expect).abs() < 1e-9, "{values:?}: {ticks:?}");
            }
            assert!((axis.share(first)).abs() < 1e-9 && (axis.share(last) - 1.0).abs() < 1e-9);
        }
    }

    #[test]
    fn a_line_runs_from_corner_to_corner() {
        let line =
            |name: &str, is_dashed| Line { name: name.to_owned(), points: vec![(0.0, 0.0), (9.0, 9.0)], is_dashed };
        let drawing = svg(&[line("ours", false), line("theirs", true)], "a title");
        assert!(drawing.contains(r##"points="70.0,460.0 730.0,50.0" fill="none" stroke="#0072b2""##), "{drawing}");
        assert_eq!(drawing.matches("stroke-dasharray").count(), 2);
        for word in ["completions", "reward", "ours", "theirs", "a title"] {
            assert!(drawing.contains(&format!(">{word}</text>")), "no {word}");
        }
        assert_eq!(drawing.matches('<').count(), drawing.matches('>').count());
    }
}
