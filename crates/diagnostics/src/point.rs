//! Panics on demand, to test their effects. Not compiled without debug assertions.

/// A place where `AEROSTAT_TEST_PANIC` can trigger a panic: `POINT[,after=POINT][,times=N]` panics
/// the first N times (default 1) that POINT is passed, after the other point was passed.
#[cfg(debug_assertions)]
pub fn panic_point(name: &str) {
    use std::sync::OnceLock;

    static PLAN: OnceLock<Option<debug::Plan>> = OnceLock::new();
    let plan = PLAN.get_or_init(|| debug::Plan::parse(&std::env::var(debug::VARIABLE).ok()?));
    if plan.as_ref().is_some_and(|plan| plan.passes(name)) {
        panic!("requested by a test at `{name}`");
    }
}

/// A place where a test program can trigger a panic.
#[cfg(not(debug_assertions))]
#[inline]
pub const fn panic_point(_name: &str) {}

#[cfg(debug_assertions)]
mod debug {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    pub(super) const VARIABLE: &str = "AEROSTAT_TEST_PANIC";

    pub(super) struct Plan {
        point: String,
        after: Option<String>,
        armed: AtomicBool,
        left: AtomicU64,
    }

    impl Plan {
        pub(super) fn parse(text: &str) -> Option<Self> {
            let mut words = text.split(',');
            let point = words.next().filter(|point| !point.is_empty())?.to_owned();
            let (mut after, mut times) = (None, 1);
            for word in words {
                match word.split_once('=') {
                    Some(("after", point)) => after = Some(point.to_owned()),
                    Some(("times", number)) => times = number.parse().ok()?,
                    _ => return None,
                }
            }
            let armed = AtomicBool::new(after.is_none());
            Some(Self { point, after, armed, left: AtomicU64::new(times) })
        }

        /// Records that a point is passed; returns whether it must panic.
        pub(super) fn passes(&self, name: &str) -> bool {
            if self.after.as_deref() == Some(name) {
                self.armed.store(true, Ordering::SeqCst);
            }
            let is_it = self.point == name && self.armed.load(Ordering::SeqCst);
            let take = |left: u64| left.checked_sub(1);
            is_it && self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok()
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_plan_has_a_point_a_condition_and_a_count() {
            let plan = Plan::parse("cpu,after=round,times=2").unwrap();
            let passed = ["cpu", "round", "cpu", "disk", "cpu", "cpu"].map(|it| plan.passes(it));
            assert_eq!(passed, [false, false, true, false, true, false]);
            assert!(Plan::parse("cpu").unwrap().passes("cpu"));
            assert!(Plan::parse("").is_none() && Plan::parse("cpu,often").is_none());
        }
    }
}
