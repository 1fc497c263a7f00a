//! Sizes, rates and durations as people write them: `64MiB`, `50mbit`, `10ms`.
//!
//! A number without a unit is refused everywhere: the one thing worse than a wrong value is one that
//! is right in another unit.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A text was no quantity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no {what}; write it as {example}")]
pub struct UnitError {
    what: &'static str,
    example: &'static str,
    text: String,
}

/// A unit and how many base units it stands for.
type Unit = (&'static str, u64);

fn parse(text: &str, what: &'static str, example: &'static str, units: &[Unit]) -> Result<u64, UnitError> {
    let error = || UnitError { what, example, text: text.chars().take(40).collect() };
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().map_err(|_| error())?;
    if number == 0 && unit.is_empty() {
        return Ok(0);
    }
    let (_, factor) = units.iter().find(|(name, _)| *name == unit.trim()).ok_or_else(error)?;
    number.checked_mul(*factor).ok_or_else(error)
}

/// Writes `value` in the largest unit that divides it.
fn show(value: u64, units: &[Unit], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let unit =
        units.iter().filter(|(_, factor)| value.is_multiple_of(*factor)).max_by_key(|(_, factor)| *factor);
    match unit {
        Some((name, factor)) => write!(f, "{}{name}", value / factor),
        None => write!(f, "{value}"),
    }
}

macro_rules! quantity {
    ($(#[$doc:meta])* $name:ident, $what:literal, $example:literal, $units:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub struct $name(pub u64);

        impl FromStr for $name {
            type Err = UnitError;
            fn from_str(text: &str) -> Result<Self, UnitError> {
                parse(text, $what, $example, $units).map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                show(self.0, $units, f)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }
    };
}

quantity!(
    /// Bytes.
    Size, "size", "64MiB (B, KiB, MiB, GiB, TiB)",
    &[("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)]
);
quantity!(
    /// Bits per second.
    Rate, "rate", "50mbit (bit, kbit, mbit, gbit)",
    &[("bit", 1), ("kbit", 1_000), ("mbit", 1_000_000), ("gbit", 1_000_000_000)]
);
quantity!(
    /// A length of time in nanoseconds.
    Span, "duration", "10ms (us, ms, s, m, h)",
    &[("ns", 1), ("us", 1_000), ("ms", 1_000_000), ("s", 1_000_000_000), ("m", 60_000_000_000), ("h", 3_600_000_000_000)]
);

impl Rate {
    /// What each of so many has of it.
    #[must_use]
    pub const fn divided(self, among: u64) -> Self {
        let each = if among == 0 { self.0 } else { self.0 / among };
        Self(if each == 0 { 1 } else { each })
    }

    /// Whole bytes per second.
    #[must_use]
    pub const fn bytes_per_second(self) -> u64 {
        self.0 / 8
    }
}

impl Span {
    /// A span of whole milliseconds.
    #[must_use]
    pub const fn from_millis(ms: u64) -> Self {
        Self(ms * 1_000_000)
    }

    /// The same as the standard library's type.
    #[must_use]
    pub const fn duration(self) -> Duration {
        Duration::from_nanos(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn units_are_read() {
        assert_eq!("64MiB".parse(), Ok(Size(64 << 20)));
        assert_eq!("1 KiB".parse(), Ok(Size(1024)));
        assert_eq!("50mbit".parse::<Rate>().map(Rate::bytes_per_second), Ok(6_250_000));
        assert_eq!("10ms".parse::<Span>().map(Span::duration), Ok(Duration::from_millis(10)));
        assert_eq!("0".parse(), Ok(Span(0)));
    }

    #[test]
    fn numbers_without_a_unit_and_overflows_are_refused() {
        for bad in ["", "64", "MiB", "64MB", "-1MiB", "1.5MiB", "99999999999TiB", "64MiBs"] {
            let error = bad.parse::<Size>().unwrap_err();
            assert!(error.to_string().contains("write it as 64MiB"), "{bad}");
        }
        assert!("10".parse::<Span>().is_err());
        assert!("10Mbit".parse::<Rate>().is_err());
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_back(value in any::<u64>()) {
            prop_assert_eq!(Size(value).to_string().parse(), Ok(Size(value)));
            prop_assert_eq!(Span(value).to_string().parse(), Ok(Span(value)));
        }

        #[test]
        fn any_text_is_read_or_refused(text in ".{0,40}") {
            let _ = text.parse::<Rate>();
        }
    }
}
