//! One line over the steps, as SVG.

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 20.0;
const BOTTOM: f64 = 50.0;
/// Lines across, and their labels.
const NUM_TICKS: usize = 5;
/// Points of the line at most; of more, every n-th is drawn.
const MAX_POINTS: usize = 600;

/// A drawing of `points`, steps and values, both finite; `None` where two of them are not there. `name` is plain text.
pub(super) fn svg(points: &[(f64, f64)], name: &str) -> Option<String> {
    let points: Vec<_> = points.iter().filter(|point| point.1.is_finite()).collect();
    let (first, last) = (points.first()?.0, points.last()?.0);
    if last <= first {
        return None;
    }
    let (least, most) =
        points.iter().fold((f64::MAX, f64::MIN), |(least, most), point| (least.min(point.1), most.max(point.1)));
    let range = (most - least).max(1e-6);
    let x = |step: f64| LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT);
    let y = |value: f64| HEIGHT - BOTTOM - (value - least) / range * (HEIGHT - TOP - BOTTOM);

    let mut parts = vec![
        format!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">"#
        ),
        format!(r#"<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>"#),
    ];
    for tick in 0..NUM_TICKS {
        let share = tick as f64 / (NUM_TICKS - 1) as f64;
        let (step, value) = (first + share * (last - first), least + share * range);
        let (right, height) = (WIDTH - RIGHT, y(value));
        parts.push(format!(r##"<line x1="{LEFT}" y1="{height:.1}" x2="{right}" y2="{height:.1}" stroke="#dddddd"/>"##));
        parts.push(text((LEFT - 8.0, height + 4.0), "end", &format!("{value:.3}")));
        parts.push(text((x(step), HEIGHT - BOTTOM + 18.0), "middle", &format!("{step:.0}")));
    }
    parts.push(text((f64::midpoint(LEFT, WIDTH - RIGHT), HEIGHT - 10.0), "middle", &format!("{name} over steps")));
    let stride = points.len().div_ceil(MAX_POINTS);
    let line = points.iter().step_by(stride).map(|point| format!("{:.1},{:.1}", x(point.0), y(point.1)));
    let line = line.collect::<Vec<_>>().join(" ");
    parts.push(format!(r##"<polyline points="{line}" fill="none" stroke="#0072b2" stroke-width="2"/>"##));
    parts.push("</svg>\n".to_owned());
    Some(parts.join("\n"))
}

fn text((x, y): (f64, f64), anchor: &str, content: &str) -> String {
    format!(r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{content}</text>"#)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_runs_over_the_whole_drawing() {
        let drawing = svg(&[(1.0, 0.5), (2.0, f64::NAN), (11.0, 1.5)], "reward").unwrap();
        assert!(drawing.contains(r#"<polyline points="70.0,270.0 700.0,20.0""#), "{drawing}");
        for word in ["reward over steps", "0.500", "1.500", "1", "11"] {
            assert!(drawing.contains(&format!(">{word}</text>")), "no {word} in {drawing}");
        }
        let many: Vec<_> = (0..10_000).map(|step| (f64::from(step), 1.0)).collect();
        let drawing = svg(&many, "reward").unwrap();
        assert!(drawing.matches(',').count() <= MAX_POINTS, "{}", drawing.len());
        assert_eq!(svg(&[(1.0, 0.5)], "reward"), None);
    }
}
