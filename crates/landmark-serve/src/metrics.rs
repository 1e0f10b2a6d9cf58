//! What the server counts, as Prometheus reads it.

use std::fmt::Write;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

/// Upper ends of the buckets of times, in seconds.
const BUCKETS: [f64; 14] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1., 2.5, 10., 60., 600.];

/// A number that grows.
#[derive(Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// So much more.
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that is what it is now.
#[derive(Default)]
pub struct Gauge(AtomicI64);

impl Gauge {
    /// It is this now.
    pub fn set(&self, value: usize) {
        self.0.store(value as i64, Ordering::Relaxed);
    }
}

/// How often something took how long.
#[derive(Default)]
pub struct Times {
    buckets: [Counter; BUCKETS.len()],
    count: Counter,
    microseconds: Counter,
}

impl Times {
    /// Once more.
    pub fn add(&self, time: Duration) {
        for (bucket, end) in self.buckets.iter().zip(BUCKETS) {
            if time.as_secs_f64() <= end {
                bucket.add(1);
            }
        }
        self.count.add(1);
        self.microseconds.add(time.as_micros() as u64);
    }

    fn seconds(&self) -> f64 {
        self.microseconds.get() as f64 / 1e6
    }
}

/// All that is counted.
#[derive(Default)]
pub struct Metrics {
    /// Requests that were answered, by the hundreds of their status.
    pub statuses: [Counter; 6],
    /// Requests whose client left before their end.
    pub cancelled: Counter,
    /// Requests that wait, and that are worked on.
    pub waiting: Gauge,
    /// Those that are worked on.
    pub active: Gauge,
    /// Tokens of prompts and texts that were read, and those that did not have to be.
    pub read_tokens: Counter,
    /// Tokens of prompts that were read before.
    pub cached_tokens: Counter,
    /// Tokens that were written.
    pub written_tokens: Counter,
    /// Chunks of prompts and texts.
    pub reading: Times,
    /// From the arrival of a request to its first token.
    pub first_token: Times,
    /// From a token of a text to its next one, the turns of other requests included.
    pub between_tokens: Times,
    /// A pass with a token of each text that is written.
    pub writing: Times,
    /// Prompts that are kept, and their bytes.
    pub kept_prompts: Gauge,
    /// Bytes of kept prompts.
    pub kept_bytes: Gauge,
    /// Heads' blocks of sessions that came from disk into RAM (or onto the GPU), and that were there.
    pub units_loaded: Counter,
    /// Heads' blocks that were where queries read them.
    pub units_found: Counter,
    /// Sessions that some request has open.
    pub open_sessions: Gauge,
    /// Bytes of blocks and landmarks in RAM of what is worked on.
    pub active_bytes: Gauge,
    /// Those in pools on the GPU.
    pub active_gpu_bytes: Gauge,
}

impl Metrics {
    /// In Prometheus' text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let mut put = |name: &str, kind: &str, help: &str, lines: String| {
            // A String takes everything.
            let _ = write!(text, "# HELP landmark_{name} {help}\n# TYPE landmark_{name} {kind}\n{lines}");
        };
        let statuses = self.statuses.iter().enumerate().skip(1).map(|(hundreds, counter)| {
            format!("landmark_requests_total{{status=\"{hundreds}xx\"}} {}\n", counter.get())
        });
        put("requests_total", "counter", "Requests that were answered.", statuses.collect());
        for (name, help, counter) in [
            ("requests_cancelled_total", "Requests whose client left before their end.", &self.cancelled),
            ("read_tokens_total", "Tokens of prompts and appended texts that were read.", &self.read_tokens),
            ("cached_tokens_total", "Tokens of prompts that had been read before.", &self.cached_tokens),
            ("written_tokens_total", "Tokens that were written.", &self.written_tokens),
            (
                "units_loaded_total",
                "Heads' blocks of sessions that were loaded when they were read.",
                &self.units_loaded,
            ),
            ("units_found_total", "Heads' blocks of sessions that were there when they were read.", &self.units_found),
        ] {
            put(name, "counter", help, format!("landmark_{name} {}\n", counter.get()));
        }
        for (name, help, gauge) in [
            ("requests_waiting", "Requests that wait for their turn.", &self.waiting),
            ("requests_active", "Requests that are worked on.", &self.active),
            ("kept_prompts", "Prompts that are kept to be gone on with.", &self.kept_prompts),
            ("kept_bytes", "Bytes of memory set aside for blocks of kept prompts.", &self.kept_bytes),
            ("open_sessions", "Sessions that a request has open.", &self.open_sessions),
            (
                "active_bytes",
                "Bytes of RAM (of the model's device, for prompts) for blocks of what is worked on.",
                &self.active_bytes,
            ),
            ("active_gpu_bytes", "Bytes of sessions' pools on the GPU of what is worked on.", &self.active_gpu_bytes),
        ] {
            put(name, "gauge", help, format!("landmark_{name} {}\n", gauge.0.load(Ordering::Relaxed)));
        }
        for (name, help, times) in [
            ("read_seconds", "Time of a chunk that is read; tokens over it are the rate of prefill.", &self.reading),
            (
                "write_seconds",
                "Time of a pass with a token of each text that is written; tokens over it are the rate of decoding.",
                &self.writing,
            ),
            ("first_token_seconds", "From the arrival of a request to its first token.", &self.first_token),
            (
                "between_tokens_seconds",
                "From a token to the next, with the turns of other requests.",
                &self.between_tokens,
            ),
        ] {
            let mut lines = String::new();
            for (end, bucket) in BUCKETS.iter().zip(&times.buckets) {
                let _ = writeln!(lines, "landmark_{name}_bucket{{le=\"{end}\"}} {}", bucket.get());
            }
            let count = times.count.get();
            let _ = writeln!(lines, "landmark_{name}_bucket{{le=\"+Inf\"}} {count}");
            let _ = writeln!(lines, "landmark_{name}_sum {}\nlandmark_{name}_count {count}", times.seconds());
            put(name, "histogram", help, lines);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_fall_into_all_buckets_above_them() {
        let metrics = Metrics::default();
        metrics.first_token.add(Duration::from_millis(30));
        metrics.first_token.add(Duration::from_secs(1000));
        let text = metrics.text();
        for line in [
            "landmark_first_token_seconds_bucket{le=\"0.025\"} 0",
            "landmark_first_token_seconds_bucket{le=\"0.05\"} 1",
            "landmark_first_token_seconds_bucket{le=\"600\"} 1",
            "landmark_first_token_seconds_bucket{le=\"+Inf\"} 2",
            "landmark_first_token_seconds_count 2",
            "landmark_first_token_seconds_sum 1000.03",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
