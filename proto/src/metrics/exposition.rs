//! Prometheus' text format, version 0.0.4.

use std::fmt::{Display, Write};

/// What a scrape is told that it gets.
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What one metric has come to.
#[derive(Debug, Clone)]
pub enum Value {
    Counter(u64),
    /// One counter for each value of a label.
    Counters(&'static str, Vec<(&'static str, u64)>),
    Gauge(f64),
    /// One gauge for each value of a label.
    Gauges(&'static str, Vec<(String, f64)>),
    Histogram(Snapshot),
}

/// A histogram at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    /// Upper bound, and how many values are in this bucket alone; the last one has no bound.
    pub buckets: Vec<(Option<f64>, u64)>,
    pub sum: f64,
}

impl Snapshot {
    /// The same values with the first `num_finer` buckets made part of the next.
    #[must_use]
    pub fn coarser(&self, num_finer: usize) -> Self {
        let mut buckets = self.buckets[num_finer..].to_vec();
        buckets[0].1 += self.buckets[..num_finer].iter().map(|(_, count)| count).sum::<u64>();
        Self { buckets, sum: self.sum }
    }
}

impl Value {
    fn kind(&self) -> &'static str {
        match self {
            Self::Counter(_) | Self::Counters(..) => "counter",
            Self::Gauge(_) | Self::Gauges(..) => "gauge",
            Self::Histogram(_) => "histogram",
        }
    }
}

/// A page of metrics in the making.
#[derive(Debug, Default)]
pub struct Exposition(String);

impl Exposition {
    /// Adds a metric; `labels` go with every one of its samples.
    pub fn push(&mut self, name: &str, help: &str, labels: &[(&str, &str)], value: &Value) {
        self.line(format_args!("# HELP {name} {}", help.replace('\\', r"\\").replace('\n', r"\n")));
        self.line(format_args!("# TYPE {name} {}", value.kind()));
        match value {
            Value::Counter(count) => self.sample(name, labels, count),
            Value::Gauge(gauge) => self.sample(name, labels, Number(*gauge)),
            Value::Gauges(label, gauges) => {
                for (value, gauge) in gauges {
                    self.sample(name, &[labels, &[(*label, value)]].concat(), Number(*gauge));
                }
            }
            Value::Counters(label, counts) => {
                for (value, count) in counts {
                    self.sample(name, &[labels, &[(*label, *value)]].concat(), count);
                }
            }
            Value::Histogram(Snapshot { buckets, sum }) => {
                let mut count = 0;
                for (bound, in_bucket) in buckets {
                    count += in_bucket;
                    // With a decimal point, as the clients of other languages write it: selectors compare text.
                    let bound = bound.map_or("+Inf".to_owned(), |bound| format!("{bound:?}"));
                    self.sample(&format!("{name}_bucket"), &[labels, &[("le", &bound)]].concat(), count);
                }
                self.sample(&format!("{name}_sum"), labels, sum);
                self.sample(&format!("{name}_count"), labels, count);
            }
        }
    }

    #[must_use]
    pub fn into_text(self) -> String {
        self.0
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let labels: Vec<String> = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escape(value))).collect();
        match labels.is_empty() {
            true => self.line(format_args!("{name} {value}")),
            false => self.line(format_args!("{name}{{{}}} {value}", labels.join(","))),
        }
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        writeln!(self.0, "{line}").expect("a string takes everything");
    }
}

/// With the format's own words for what is none.
struct Number(f64);

impl Display for Number {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            f64::INFINITY => f.write_str("+Inf"),
            f64::NEG_INFINITY => f.write_str("-Inf"),
            number => write!(f, "{number}"),
        }
    }
}

fn escape(label: &str) -> String {
    label.replace('\\', r"\\").replace('"', r#"\""#).replace('\n', r"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_written_as_prometheus_reads_it() {
        let mut page = Exposition::default();
        page.push("steps_total", "Steps.", &[], &Value::Counter(7));
        page.push("usage", "A \\ and\na line.", &[("model", "a \"b\"\\c\n")], &Value::Gauge(0.25));
        page.push("ended_total", "Ends.", &[("m", "x")], &Value::Counters("why", vec![("stop", 3), ("abort", 0)]));
        let gauges = vec![("a/b".to_owned(), f64::NAN), ("\n".to_owned(), f64::INFINITY), ("c".to_owned(), -0.5)];
        page.push("reward", "R.", &[], &Value::Gauges("f", gauges));
        let buckets = vec![(Some(0.001), 2), (Some(2.5), 0), (Some(10.0), 3), (None, 1)];
        let snapshot = Snapshot { buckets, sum: 31.5 };
        page.push("latency_seconds", "Time.", &[("m", "x")], &Value::Histogram(snapshot));
        let expect = r#"# HELP steps_total Steps.
# TYPE steps_total counter
steps_total 7
# HELP usage A \\ and\na line.
# TYPE usage gauge
usage{model="a \"b\"\\c\n"} 0.25
# HELP ended_total Ends.
# TYPE ended_total counter
ended_total{m="x",why="stop"} 3
ended_total{m="x",why="abort"} 0
# HELP reward R.
# TYPE reward gauge
reward{f="a/b"} NaN
reward{f="\n"} +Inf
reward{f="c"} -0.5
# HELP latency_seconds Time.
# TYPE latency_seconds histogram
latency_seconds_bucket{m="x",le="0.001"} 2
latency_seconds_bucket{m="x",le="2.5"} 2
latency_seconds_bucket{m="x",le="10.0"} 5
latency_seconds_bucket{m="x",le="+Inf"} 6
latency_seconds_sum{m="x"} 31.5
latency_seconds_count{m="x"} 6
"#;
        assert_eq!(page.into_text(), expect);
    }
}
