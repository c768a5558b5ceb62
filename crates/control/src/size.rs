//! Sizes in binary units.

use std::fmt;

use page_set::PAGE_BYTES;
use std::str::FromStr;

/// A number of bytes, parsed and printed in binary units.
///
/// Parsed: `3GiB`, `3G` (the same), `512 MiB`, `1.5g`, `1048576`, `4096B`. A number without a unit
/// is in bytes; a small one is refused, since a user who types `1024` probably means MiB, as in
/// QEMU. Printed: the largest unit that gives a whole number, as `3 GiB` or `1536 MiB`, or two
/// decimals if that number would be long. `{:#}` omits the space, which gives a form that can be
/// parsed again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Size(pub u64);

/// Units in descending order, with their powers of two.
const UNITS: [(&str, u32); 6] =
    [("EiB", 60), ("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];

/// Digits accepted after the point: 10^9 times a `u64` fits into the `u128` of the calculation.
const FRACTION_DIGITS: usize = 9;

/// Smallest number accepted without a unit, except 0: fewer bytes are hardly meant.
const LEAST_BARE_BYTES: u64 = 1 << 20;

/// Whole numbers above this are printed with two decimals of a larger unit: `3145727 KiB` is hard
/// to read.
const LONGEST_WHOLE: u64 = 9999;

/// A text that is not a valid size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not a valid size: {why}; use a form like 3GiB, 512MiB, 1.5G or 1048576 (bytes)"
)]
pub struct ParseSizeError {
    text: String,
    why: String,
}

impl ParseSizeError {
    fn of(text: &str) -> impl Fn(String) -> Self {
        move |why| Self { text: text.into(), why }
    }
}

impl FromStr for Size {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, ParseSizeError> {
        let read = || -> Result<u64, String> {
            let (number, unit) = parts(text);
            let bytes = parse(number, unit)?;
            if unit.is_empty() && bytes != 0 && bytes < LEAST_BARE_BYTES {
                return Err(format!("a number this small needs a unit; did you mean {number}MiB?"));
            }
            Ok(bytes)
        };
        read().map(Self).map_err(ParseSizeError::of(text))
    }
}

impl Size {
    /// Parses a size in whole 4 KiB pages. A decimal fraction is rounded down to pages; any other
    /// size that is not a multiple of 4 KiB is refused. 0 is accepted.
    ///
    /// # Errors
    /// The text is not such a size.
    pub fn of_pages(text: &str) -> Result<Self, ParseSizeError> {
        let Self(bytes) = text.parse()?;
        let whole = bytes - bytes % PAGE_BYTES;
        let refuse = |why: String| Err(ParseSizeError::of(text)(why));
        if bytes != 0 && whole == 0 {
            let (number, _) = parts(text);
            return refuse(format!("it is less than a 4 KiB page; did you mean {number}MiB?"));
        }
        if bytes != whole && !text.contains('.') {
            let short = format!("{:#}", Self(whole));
            let is_exact = parse(parts(&short).0, parts(&short).1) == Ok(whole);
            let near = if is_exact { short } else { format!("{whole}B") };
            return refuse(format!("it is not a multiple of 4 KiB; did you mean {near}?"));
        }
        Ok(Self(whole))
    }

    /// Parses the size of a memory block, which may be as small as a page: here `4096` is bytes.
    ///
    /// # Errors
    /// The text is not a size.
    pub fn of_block(text: &str) -> Result<Self, ParseSizeError> {
        let (number, unit) = parts(text);
        let read = parse(number, unit).map(Self);
        read.map_err(|why| ParseSizeError::of(text)(why.to_owned()))
    }
}

/// Splits into number and unit.
fn parts(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    (number, unit.trim_start())
}

fn parse(number: &str, unit: &str) -> Result<u64, &'static str> {
    let shift = shift_of(unit)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || (number.contains('.') && fraction.is_empty()) {
        return Err("it does not begin with a number");
    }
    if fraction.len() > FRACTION_DIGITS || fraction.contains('.') {
        return Err("its fraction does not have 1 to 9 digits");
    }
    let whole: u64 = whole.parse().map_err(|_| "it is too large")?;
    let bytes = (u128::from(whole) << shift) + fraction_bytes(fraction, shift)?;
    u64::try_from(bytes).map_err(|_| "it is too large")
}

/// Converts `0.fraction` units to bytes, rounded down.
fn fraction_bytes(fraction: &str, shift: u32) -> Result<u128, &'static str> {
    if fraction.is_empty() {
        return Ok(0);
    }
    if shift == 0 {
        return Err("a byte has no fraction");
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
        [_, b'B' | b'b'] => Err("decimal units are not accepted, only binary ones"),
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn all_accepted_forms_are_parsed() {
        let forms = [
            ("0", 0),
            ("1048576", MIB),
            ("4096B", 4096),
            ("4k", 4096),
            ("3GiB", 3 * GIB),
            ("3G", 3 * GIB),
            ("3g", 3 * GIB),
            ("3gib", 3 * GIB),
            (" 3 GiB ", 3 * GIB),
            ("512MiB", 512 * MIB),
            ("1.5GiB", 1536 * MIB),
            ("0.5M", MIB / 2),
            ("1.000000001KiB", 1024),
            ("2TiB", 2048 * GIB),
            ("15.999999999EiB", u64::MAX - 1_152_921_504),
            ("18446744073709551615", u64::MAX),
        ];
        for (text, bytes) in forms {
            assert_eq!(text.parse::<Size>().unwrap_or_else(|e| panic!("{e}")).0, bytes, "{text}");
        }
    }

    #[test]
    fn implausibly_small_sizes_are_refused_with_a_suggestion() {
        for (text, meant) in [
            ("1024", "1024MiB"),
            ("4095", "4095MiB"),
            ("4096", "4096MiB"),
            ("1", "1MiB"),
            ("1048575", "1048575MiB"),
        ] {
            for error in [text.parse::<Size>().unwrap_err(), Size::of_pages(text).unwrap_err()] {
                let error = error.to_string();
                assert!(error.contains(&format!("did you mean {meant}?")), "{error}");
            }
        }
        for (text, meant) in [
            ("1k", "1MiB"),
            ("0.5KiB", "0.5MiB"),
            ("4095B", "4095MiB"),
            ("1048577", "1MiB"),
            ("5k", "4KiB"),
            ("3000000000", "2999996416B"),
        ] {
            let error = Size::of_pages(text).unwrap_err().to_string();
            assert!(error.contains(&format!("did you mean {meant}?")), "{error}");
        }
    }

    #[test]
    fn whole_pages_are_parsed_and_fractions_rounded_to_them() {
        let sizes = [
            ("0", 0),
            ("0MiB", 0),
            ("4k", 4096),
            ("1024MiB", GIB),
            ("1048576", MIB),
            ("1.3GiB", 1_395_863_552),
        ];
        for (text, bytes) in sizes {
            let read = Size::of_pages(text).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(read.0, bytes, "{text}");
        }
        assert_eq!(Size::of_block("4096").unwrap(), Size(4096));
        assert_eq!(Size::of_block("2MiB").unwrap(), Size(2 * MIB));
        assert!(Size::of_block("2XiB").is_err());
    }

    #[test]
    fn other_texts_are_refused_and_the_error_lists_the_accepted_forms() {
        let wrong = [
            "",
            " ",
            "GiB",
            "-1",
            "+1",
            "3GB",
            "3 gb",
            "3Gi",
            "3XiB",
            "3GiBx",
            "1.",
            ".5G",
            "1.5",
            "1.5B",
            "1.2.3G",
            "1..2G",
            "16EiB",
            "18446744073709551616",
            "1e3",
            "0x10",
            "3 3G",
            "٣G",
            "1.0000000001G",
        ];
        for text in wrong {
            let error = text.parse::<Size>().expect_err(text).to_string();
            assert!(error.contains("3GiB, 512MiB, 1.5G or 1048576"), "{error}");
        }
    }

    #[test]
    fn sizes_are_printed_in_short_form() {
        let texts = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1025, "1025 B"),
            (20_000, "19.53 KiB"),
            (1536 * MIB, "1536 MiB"),
            (3 * GIB, "3 GiB"),
            (3 * GIB - 4096, "2.99 GiB"),
            (GIB + 4096, "1.00 GiB"),
            (16 * GIB + 512 * MIB, "16.50 GiB"),
            (u64::MAX, "15.99 EiB"),
        ];
        for (bytes, text) in texts {
            assert_eq!(Size(bytes).to_string(), text);
        }
        assert_eq!(format!("{:#}", Size(3 * GIB)), "3GiB");
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "[0-9.]{0,25} ?[a-zA-Z]{0,4}") {
            let read = text.parse::<Size>();
            let pages = Size::of_pages(&text);
            prop_assert!(pages.is_err() || read.is_ok_and(|read| read >= pages.clone().unwrap()));
            prop_assert!(pages.is_err() || pages.unwrap().0.is_multiple_of(4096));
        }

        #[test]
        fn a_printed_size_parses_to_nearly_the_same_value(bytes: u64) {
            let again = format!("{:#}", Size(bytes)).parse::<Size>().unwrap().0;
            prop_assert!(again <= bytes && bytes - again <= bytes / 100, "{again}");
        }
    }
}
