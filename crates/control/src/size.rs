//! Sizes as people read and write them: binary units.

use std::fmt;
use std::str::FromStr;

/// A number of bytes that is read and printed in binary units.
///
/// Read: `3GiB`, `3G` (the same), `512 MiB`, `1.5g`, `1048576`, `4096B`.
/// Printed: the largest unit that leaves a whole number, as `3 GiB` or
/// `1536 MiB`, and two decimals where that number would be long. With `{:#}`
/// without the space, which is a form that can be read again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Size(pub u64);

/// Units from large to small, with the power of two each stands for.
const UNITS: [(&str, u32); 6] =
    [("EiB", 60), ("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];

/// Digits after the point that are read. More say nothing about whole bytes,
/// and 10^9 times a `u64` fits into the `u128` of the calculation.
const FRACTION_DIGITS: usize = 9;

/// Whole numbers above this are printed with two decimals of a larger unit,
/// because nobody reads `3145727 KiB`.
const LONGEST_WHOLE: u64 = 9999;

/// A text that is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a size: {why}; write it like 3GiB, 512MiB, 1.5G or 1048576 (bytes)")]
pub struct ParseSizeError {
    text: String,
    why: &'static str,
}

impl FromStr for Size {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, ParseSizeError> {
        parse(text.trim()).map(Self).map_err(|why| ParseSizeError { text: text.into(), why })
    }
}

fn parse(text: &str) -> Result<u64, &'static str> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let shift = shift_of(unit.trim_start())?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || (number.contains('.') && fraction.is_empty()) {
        return Err("it does not begin with a number");
    }
    if fraction.len() > FRACTION_DIGITS || fraction.contains('.') {
        return Err("its fraction is not one of up to 9 digits");
    }
    let whole: u64 = whole.parse().map_err(|_| "it is too large")?;
    let bytes = (u128::from(whole) << shift) + fraction_bytes(fraction, shift)?;
    u64::try_from(bytes).map_err(|_| "it is too large")
}

/// The bytes of `0.fraction` units, rounded down.
fn fraction_bytes(fraction: &str, shift: u32) -> Result<u128, &'static str> {
    if fraction.is_empty() {
        return Ok(0);
    }
    if shift == 0 {
        return Err("there is no fraction of a byte");
    }
    let digits: u128 = fraction.parse().map_err(|_| "its fraction is not a number")?;
    let scale = fraction.bytes().fold(1_u128, |scale, _| scale * 10);
    Ok((digits << shift) / scale)
}

fn shift_of(unit: &str) -> Result<u32, &'static str> {
    if unit.is_empty() || unit.eq_ignore_ascii_case("b") {
        return Ok(0);
    }
    let known = |(name, _): &&(&str, u32)| {
        unit.eq_ignore_ascii_case(name) || unit.eq_ignore_ascii_case(&name[..1])
    };
    if let Some((_, shift)) = UNITS.iter().find(known) {
        return Ok(*shift);
    }
    match unit.as_bytes() {
        [_, b'B' | b'b'] => Err("decimal units are not used here, only binary ones"),
        _ => Err("its unit is unknown"),
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let space = if f.alternate() { "" } else { " " };
        for (name, shift) in UNITS {
            let (whole, rest) = (self.0 >> shift, self.0 & ((1_u64 << shift) - 1));
            if whole == 0 {
                continue;
            }
            if rest == 0 {
                return write!(f, "{whole}{space}{name}");
            }
            if self.0.trailing_zeros() + 10 < shift || self.0 >> (shift - 10) > LONGEST_WHOLE {
                let hundredths = (u128::from(rest) * 100) >> shift;
                return write!(f, "{whole}.{hundredths:02}{space}{name}");
            }
        }
        write!(f, "{}{space}B", self.0)
    }
}
