//! Statistics of a few runs.

use serde::{Deserialize, Serialize};

/// Minimum, median and maximum of some runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Minimum.
    pub min: f64,
    /// Median.
    pub median: f64,
    /// Maximum.
    pub max: f64,
}

impl Spread {
    /// Spread of `samples`, zeros if there are none.
    pub fn of(samples: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = samples.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let end = |sample: Option<&f64>| sample.copied().unwrap_or(0.0);
        Self { min: end(sorted.first()), median: median(&sorted), max: end(sorted.last()) }
    }
}

/// Middle of `sorted`, or the mean of the two in the middle.
pub fn median(sorted: &[f64]) -> f64 {
    let at = sorted.len() / 2;
    match (sorted.get(at.wrapping_sub(1)), sorted.get(at)) {
        (Some(low), Some(high)) if sorted.len().is_multiple_of(2) => f64::midpoint(*low, *high),
        (_, Some(middle)) => *middle,
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spread_does_not_depend_on_the_order() {
        let spread = Spread::of([3.0, 1.0, 2.0]);
        assert_eq!(spread, Spread { min: 1.0, median: 2.0, max: 3.0 });
        assert_eq!(Spread::of([4.0, 1.0]).median, 2.5);
        assert_eq!(Spread::of([]), Spread::default());
    }
}
