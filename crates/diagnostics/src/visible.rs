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

#[cfg(test)]
mod tests {
    use super::visible;

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
