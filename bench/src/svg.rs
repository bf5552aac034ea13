//! A bar chart as SVG: groups of horizontal bars on one scale, readable on light and dark pages.

/// One bar.
#[derive(Debug)]
pub(crate) struct Bar<'a> {
    /// Whose it is: also decides the colour.
    pub(crate) name: &'a str,
    /// In the scale of the chart; 1 is marked by a line.
    pub(crate) length: f64,
    /// Written behind it.
    pub(crate) label: String,
}

/// Bars that belong together.
#[derive(Debug)]
pub(crate) struct Group<'a> {
    /// Written above them.
    pub(crate) title: String,
    /// From top to bottom.
    pub(crate) bars: Vec<Bar<'a>>,
}

const WIDTH: f64 = 900.0;
const LEFT: f64 = 90.0;
/// Where a bar of length 1 ends.
const UNIT: f64 = 420.0;
/// Longer bars are cut here; their label says the value.
const LONGEST: f64 = 1.5;

/// The chart of `groups`.
pub(crate) fn bars(title: &str, groups: &[Group<'_>]) -> String {
    let mut body = String::new();
    let mut y = 44.0;
    for group in groups {
        y += 16.0;
        body.push_str(&format!("<text x=\"{LEFT}\" y=\"{y}\" class=\"g\">{}</text>\n", escape(&group.title)));
        y += 6.0;
        for bar in &group.bars {
            let cut = bar.length.clamp(0.0, LONGEST);
            let width = (cut * UNIT).max(1.0);
            let more = if bar.length > LONGEST { format!(" ({:.1}×)", bar.length) } else { String::new() };
            body.push_str(&format!(
                "<text x=\"{:.1}\" y=\"{:.1}\" class=\"n\">{}</text>\
                 <rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"11\" fill=\"{}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\">{}{more}</text>\n",
                LEFT - 6.0,
                y + 9.5,
                escape(bar.name),
                colour(bar.name),
                LEFT + width + 6.0,
                y + 9.5,
                escape(&bar.label),
            ));
            y += 14.0;
        }
    }
    let line = LEFT + UNIT;
    let height = y + 16.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\">\n\
         <title>{title}</title>\n\
         <style>text{{font:11px sans-serif;fill:#333}}.g{{font-weight:bold}}.n{{text-anchor:end}}.t{{font-size:16px}}\n\
         @media(prefers-color-scheme:dark){{text{{fill:#ddd}}}}</style>\n\
         <text x=\"{LEFT}\" y=\"26\" class=\"t\">{title}</text>\n\
         <line x1=\"{line}\" x2=\"{line}\" y1=\"40\" y2=\"{y}\" stroke=\"#999\" stroke-dasharray=\"3 3\"/>\n{body}</svg>\n",
        title = escape(title),
    )
}

fn colour(name: &str) -> &'static str {
    match name {
        "weft" => "#0a9d8e",
        "envoy" | "envoy-h2" => "#b04a9c",
        "haproxy" => "#4a7bd0",
        _ => "#8a8f98",
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_to_scale_cut_and_escaped() {
        let group = Group {
            title: "a < b & c".into(),
            bars: vec![
                Bar { name: "weft", length: 0.5, label: "5 µs".into() },
                Bar { name: "envoy", length: 1.0, label: "10 µs".into() },
                Bar { name: "slow", length: 9.0, label: "90 µs".into() },
            ],
        };
        let text = bars("chart", &[group]);
        assert!(text.contains("a &lt; b &amp; c"));
        assert!(text.contains("width=\"210.0\" height=\"11\" fill=\"#0a9d8e\""));
        assert!(text.contains("width=\"420.0\""));
        assert!(text.contains("width=\"630.0\"") && text.contains("90 µs (9.0×)"));
        let opened = text.matches("<text").count();
        assert_eq!(opened, text.matches("</text>").count());
        assert_eq!(text.matches("<svg").count(), text.matches("</svg>").count());
    }
}
