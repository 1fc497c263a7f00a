//! Small tools of all kinds.

use std::{
    env as environment, thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::{
    Failure, Outcome,
    input::{flush, put, put_line},
};

/// The last part of a path.
pub fn basename(arguments: &[String]) -> Outcome {
    let usage = Failure::Usage("basename PATH [SUFFIX]");
    let Some(path) = arguments.first() else { return Err(usage) };
    let name = path.trim_end_matches('/').rsplit('/').next().filter(|name| !name.is_empty()).unwrap_or("/");
    let suffix = arguments.get(1).map_or("", String::as_str);
    put_line(name.strip_suffix(suffix).filter(|name| !name.is_empty()).unwrap_or(name))?;
    Ok(())
}

/// All but the last part of a path.
pub fn dirname(arguments: &[String]) -> Outcome {
    let Some(path) = arguments.first() else { return Err(Failure::Usage("dirname PATH")) };
    let parent = path.trim_end_matches('/').rsplit_once('/').map_or(".", |(parent, _)| parent);
    put_line(if parent.is_empty() { "/" } else { parent })?;
    Ok(())
}

/// Days since 1970 as year, month, day (H. Hinnant, "chrono-compatible low-level date algorithms").
fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

/// Seconds since 1970 as a text (RFC 3339).
pub fn instant(seconds: u64) -> String {
    let (year, month, day) = civil((seconds / 86_400) as i64);
    let second = seconds % 86_400;
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", second / 3600, second / 60 % 60, second % 60)
}

/// Time of day, UTC.
pub fn date(arguments: &[String]) -> Outcome {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = now.as_secs();
    let Some(format) = arguments.iter().find_map(|word| word.strip_prefix('+')) else {
        put_line(instant(seconds))?;
        return Ok(());
    };
    let (year, month, day) = civil((seconds / 86_400) as i64);
    let second = seconds % 86_400;
    let mut text = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            text.push(letter);
            continue;
        }
        text += &match letters.next() {
            Some('Y') => year.to_string(),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{day:02}"),
            Some('H') => format!("{:02}", second / 3600),
            Some('M') => format!("{:02}", second / 60 % 60),
            Some('S') => format!("{:02}", second % 60),
            Some('N') => format!("{:09}", now.subsec_nanos()),
            Some('s') => seconds.to_string(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60),
            Some(other) => other.to_string(),
            None => "%".to_owned(),
        };
    }
    put_line(text)?;
    Ok(())
}

/// The environment.
pub fn env(_: &[String]) -> Outcome {
    Ok(environment::vars().try_for_each(|(name, value)| put_line(format!("{name}={value}")))?)
}

/// Fails.
pub fn r#false(_: &[String]) -> Outcome {
    Err(Failure::Code(1))
}

/// Numbers in order.
pub fn seq(arguments: &[String]) -> Outcome {
    const USAGE: &str = "seq [FIRST [STEP]] LAST";
    let numbers: Result<Vec<f64>, _> = arguments.iter().map(|text| text.parse()).collect();
    let (first, step, last) = match numbers.map_err(|_| Failure::Usage(USAGE))?.as_slice() {
        [last] => (1.0, 1.0, *last),
        [first, last] => (*first, 1.0, *last),
        [first, step, last] if *step != 0.0 => (*first, *step, *last),
        _ => return Err(Failure::Usage(USAGE)),
    };
    let digits = |text: &String| text.split_once('.').map_or(0, |(_, after)| after.len());
    let digits =
        arguments.iter().take(2.min(arguments.len().saturating_sub(1))).map(digits).max().unwrap_or(0);
    let mut count = 0.0;
    loop {
        let value = first + step * count;
        if step > 0.0 && value > last + 1e-9 || step < 0.0 && value < last - 1e-9 {
            return Ok(());
        }
        put_line(format!("{value:.digits$}"))?;
        count += 1.0;
    }
}

/// Waits.
pub fn sleep(arguments: &[String]) -> Outcome {
    const USAGE: &str = "sleep SECONDS[s|m|h]";
    let usage = || Failure::Usage(USAGE);
    let text = arguments.first().ok_or_else(usage)?;
    let (digits, factor) = match text.as_bytes().last().ok_or_else(usage)? {
        b's' => (&text[..text.len() - 1], 1.0),
        b'm' => (&text[..text.len() - 1], 60.0),
        b'h' => (&text[..text.len() - 1], 3600.0),
        _ => (text.as_str(), 1.0),
    };
    let seconds: f64 = digits.parse().map_err(|_| usage())?;
    thread::sleep(Duration::try_from_secs_f64(seconds * factor).map_err(|_| usage())?);
    Ok(())
}

/// Formatted text.
pub fn printf(arguments: &[String]) -> Outcome {
    let Some((format, mut values)) = arguments.split_first() else {
        return Err(Failure::Usage("printf FORMAT [VALUE…]"));
    };
    loop {
        let before = values.len();
        let mut letters = format.chars().peekable();
        while let Some(letter) = letters.next() {
            match letter {
                '\\' => put(match letters.next() {
                    Some('n') => "\n".to_owned(),
                    Some('t') => "\t".to_owned(),
                    Some('r') => "\r".to_owned(),
                    Some('0') => "\0".to_owned(),
                    Some(other) => other.to_string(),
                    None => "\\".to_owned(),
                })?,
                '%' => {
                    let mut width = String::new();
                    while let Some(more) =
                        letters.next_if(|more| more.is_ascii_digit() || "-.".contains(*more))
                    {
                        width.push(more);
                    }
                    let mut value = || {
                        let (value, rest) =
                            values.split_first().map_or(("", values), |(value, rest)| (value.as_str(), rest));
                        values = rest;
                        value
                    };
                    let number = |text: &str| text.parse::<i64>().unwrap_or_default();
                    let text = match letters.next() {
                        Some('%') => "%".to_owned(),
                        Some('d' | 'i' | 'u') => number(value()).to_string(),
                        Some('x') => format!("{:x}", number(value())),
                        Some('o') => format!("{:o}", number(value())),
                        Some('c') => value().chars().take(1).collect(),
                        Some('f') => {
                            let digits = width
                                .split_once('.')
                                .and_then(|(_, digits)| digits.parse().ok())
                                .unwrap_or(6);
                            format!("{:.digits$}", value().parse::<f64>().unwrap_or_default())
                        }
                        _ => value().to_owned(),
                    };
                    let wide = width.trim_start_matches('-').split('.').next().unwrap_or_default();
                    let zero = wide.starts_with('0') && !width.starts_with('-');
                    let wide = wide.parse::<usize>().unwrap_or(0).min(4096);
                    put(if width.starts_with('-') {
                        format!("{text:<wide$}")
                    } else if zero {
                        format!("{text:0>wide$}")
                    } else {
                        format!("{text:>wide$}")
                    })?;
                }
                letter => put(letter.to_string())?,
            }
        }
        if values.is_empty() || values.len() == before {
            return Ok(flush()?);
        }
    }
}

/// Arithmetic and comparison of two values, left to right.
pub fn expr(arguments: &[String]) -> Outcome {
    const USAGE: &str = "expr VALUE [+ - * / % = != < <= > >= VALUE]…";
    let (first, rest) = arguments.split_first().ok_or(Failure::Usage(USAGE))?;
    let mut value = first.clone();
    for pair in rest.chunks(2) {
        let [operator, other] = pair else { return Err(Failure::Usage(USAGE)) };
        let numbers = value.parse::<i64>().ok().zip(other.parse::<i64>().ok());
        let order = numbers.map_or_else(|| value.as_str().cmp(other), |(a, b)| a.cmp(&b));
        let truth = match operator.as_str() {
            "=" => Some(order.is_eq()),
            "!=" => Some(order.is_ne()),
            "<" => Some(order.is_lt()),
            "<=" => Some(order.is_le()),
            ">" => Some(order.is_gt()),
            ">=" => Some(order.is_ge()),
            _ => None,
        };
        value = if let Some(truth) = truth {
            u8::from(truth).to_string()
        } else {
            let (a, b) = numbers.ok_or_else(|| Failure::Error("not a number".to_owned()))?;
            let result = match operator.as_str() {
                "+" => a.checked_add(b),
                "-" => a.checked_sub(b),
                "*" => a.checked_mul(b),
                "/" => a.checked_div(b),
                "%" => a.checked_rem(b),
                _ => return Err(Failure::Usage(USAGE)),
            };
            result.ok_or_else(|| Failure::Error("division by zero, or too large".to_owned()))?.to_string()
        };
    }
    put_line(&value)?;
    if ["", "0"].contains(&value.as_str()) { Err(Failure::Code(1)) } else { Ok(()) }
}
