//! Text of others in a log, an answer or a terminal.

/// `text` with nothing in it that a reader does not see, or that changes how the rest of a line is
/// shown: control characters, line and paragraph separators, marks of direction (U+202E has what
/// follows read from right to left) and other formats, and what Unicode has not assigned, as
/// `\u{202e}`. What is shown so stays as it is when it is shown again.
#[must_use]
pub fn visible(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '\'' | '"' | '\\' => shown.push(char),
            _ => shown.extend(char.escape_debug()),
        }
    }
    shown
}

/// `text` in at most `max` bytes: where it is longer, its beginning, which says what is wrong, and its
/// end, which says what to do about it or has the name of a file.
#[must_use]
pub fn shortened(text: &str, max: usize) -> String {
    if text.len() <= max {
        return text.to_owned();
    }
    let half = max.saturating_sub(LEFT_OUT.len()) / 2;
    let (mut start, mut end) = (text.chars(), text.chars());
    while start.as_str().len() > half {
        start.next_back();
    }
    while end.as_str().len() > half {
        end.next();
    }
    format!("{}{LEFT_OUT}{}", start.as_str(), end.as_str())
}

/// Stands for what was left out.
const LEFT_OUT: &str = "...";

#[cfg(test)]
mod tests {
    use super::{shortened, visible};

    #[test]
    fn a_long_text_keeps_its_beginning_and_its_end() {
        assert_eq!(shortened("/disk", 5), "/disk");
        assert_eq!(shortened("/a/long/path/to/a/disk", 11), "/a/l...disk");
        let text = "é".repeat(100);
        for max in 9..40 {
            let short = shortened(&text, max);
            assert!(short.len() <= max && short.len() > max - 4, "{short} {max}");
            assert!(short.starts_with('é') && short.ends_with('é'), "{short}");
        }
    }

    #[test]
    fn what_nobody_sees_is_shown_and_what_is_shown_stays() {
        assert_eq!(visible("/mnt/Käse \"1\" \\ 磁盘.img"), "/mnt/Käse \"1\" \\ 磁盘.img");
        for hidden in [
            '\0',
            '\n',
            '\x1b',
            '\u{7f}',
            '\u{85}',
            '\u{9b}',
            '\u{ad}',
            '\u{61c}',
            '\u{200b}',
            '\u{200e}',
            '\u{2028}',
            '\u{2029}',
            '\u{202a}',
            '\u{202e}',
            '\u{2066}',
            '\u{2069}',
            '\u{feff}',
            '\u{e0041}',
            '\u{e000}',
        ] {
            let shown = visible(&format!("a{hidden}b"));
            assert!(shown.starts_with("a\\") && shown.ends_with('b'), "{shown}");
            assert!(shown.is_ascii() && !shown.contains(char::is_control), "{shown}");
            assert_eq!(visible(&shown), shown);
        }
    }
}
