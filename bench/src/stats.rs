//! Percentiles and medians.

/// The value below or at which `percent` of the samples lie (nearest rank: always one of the samples). `sorted` must be
/// ascending; 0 if it is empty.
pub(crate) fn percentile(sorted: &[u64], percent: f64) -> u64 {
    if sorted.is_empty() {
        return 0;
    }
    // Rounded first: 99.9 % of 1,000 must be 999, although the product of the two floats is a little more.
    let exact = percent / 100.0 * sorted.len() as f64;
    let rank = (exact - 1e-9).ceil().max(1.0) as usize;
    sorted[rank.min(sorted.len()) - 1]
}

/// The median (mean of the middle two for an even count), `None` if there is nothing.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    match n {
        0 => None,
        _ if n % 2 == 1 => Some(sorted[n / 2]),
        _ => Some(f64::midpoint(sorted[n / 2 - 1], sorted[n / 2])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_rank() {
        let thousand: Vec<u64> = (1..=1000).collect();
        for (percent, expected) in [(0.0, 1), (0.1, 1), (50.0, 500), (99.0, 990), (99.9, 999), (99.91, 1000), (100.0, 1000)] {
            assert_eq!(percentile(&thousand, percent), expected, "p{percent}");
        }
        assert_eq!(percentile(&[7], 99.9), 7);
        assert_eq!(percentile(&[1, 2], 50.0), 1);
        assert_eq!(percentile(&[1, 2], 50.1), 2);
        assert_eq!(percentile(&[], 50.0), 0);
    }

    #[test]
    fn medians_do_not_care_for_order_or_outliers() {
        assert_eq!(median(&[3.0, 1.0, 900.0]), Some(3.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 900.0]), Some(3.0));
        assert_eq!(median(&[]), None);
    }
}
