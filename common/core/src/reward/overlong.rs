//! DAPO's soft overlong punishment (arXiv 2503.14476, equation 13): not a reward function, since it looks at tokens alone.

/// 0 up to `max_completion_length - cache` tokens, then down to -1 along a line over the last `cache`, and -1 beyond.
#[must_use]
pub fn soft_overlong_punishment(num_tokens: usize, max_completion_length: u32, cache: u32) -> f32 {
    let over = num_tokens as f64 - (f64::from(max_completion_length) - f64::from(cache));
    if over <= 0.0 {
        0.0
    } else if num_tokens <= max_completion_length as usize {
        (-over / f64::from(cache)) as f32
    } else {
        -1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Expected values: TRL's get_soft_overlong_punishment(100, 20).
    #[test]
    fn falls_along_a_line_to_minus_1() {
        for (num_tokens, expect) in [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (101, -1.0)] {
            assert_eq!(soft_overlong_punishment(num_tokens, 100, 20), expect, "{num_tokens} tokens");
        }
        assert_eq!(soft_overlong_punishment(100, 100, 0), 0.0);
    }
}
