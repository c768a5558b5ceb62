//! Makes untrusted text safe for a log, an answer or a terminal.

/// Escapes all characters that are invisible or change how a line is displayed, such as `\u{202e}`:
/// control characters, line and paragraph separators, directional marks (U+202E reverses the text
/// after it) and other format characters, and unassigned code points. Applying it twice changes
/// nothing more.
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

/// Shortens `text` to at most `max` bytes. Keeps its beginning, which in an error is the cause, and
/// its end, which is the remedy or a file name.
#[must_use]
pub fn shortened(text: &str, max: usize) -> String {
    if text.len() <= max {
        return text.to_owned();
    }
    let half = max.saturating_sub(ELLIPSIS.len()) / 2;
    let (mut start, mut end) = (text.chars(), text.chars());
    while start.as_str().len() > half {
        start.next_back();
    }
    while end.as_str().len() > half {
        end.next();
    }
    format!("{}{ELLIPSIS}{}", start.as_str(), end.as_str())
}

/// Replaces the omitted part.
const ELLIPSIS: &str = "...";

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
    fn invisible_characters_are_escaped_and_escaping_is_idempotent() {
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
