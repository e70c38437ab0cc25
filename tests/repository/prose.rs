//! Comments and pages are plain technical English, as CONTRIBUTING.md asks, as far as a test can
//! check.

use std::fs;
use std::path::{Path, PathBuf};

/// The folders that the test reads, beside the files of the root itself.
const FOLDERS: [&str; 9] = [
    ".github",
    "benches",
    "docs",
    "examples",
    "fuzz",
    "model",
    "schedules",
    "src",
    "tests",
];

/// First words that make a comment or a paragraph open with a clause instead of a noun or a verb.
const OPENERS: [&str; 3] = ["What", "Who", "Whoever"];

/// Phrases that hide the agent or turn the sentence around. The check ignores case.
const PHRASES: [&str; 15] = [
    "become of",
    "becomes of",
    "became of",
    "come of it",
    "comes of it",
    "came of it",
    "of which",
    "is told",
    "are told",
    "was told",
    "were told",
    "be told",
    "been told",
    "for nobody",
    "to who",
];

#[test]
fn prose_has_no_forbidden_habit() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut found, mut read) = (Vec::new(), 0);
    for file in files(root) {
        let path = file.strip_prefix(root).unwrap().to_str().unwrap().replace('\\', "/");
        let source = fs::read_to_string(&file).unwrap();
        found.extend(habits_of(&path, &source));
        read += 1;
    }
    assert!(
        read > 200,
        "only {read} files were read: does the test still find the sources?"
    );
    assert!(found.is_empty(), "Rewrite these:\n  {}", found.join("\n  "));
}

#[test]
fn the_check_sees_habits_in_comments_only() {
    let rust = "/// What a store keeps.\nfn f() {}\n// Who waits.\nlet s = \"// Whoever\"; // Whoever waits\n";
    assert_eq!(habits_of("a.rs", rust).len(), 3);
    // A phrase that spans two lines of one comment, and a sentence in the middle of it.
    let rust = "// The outcome, of\n// which nobody heard. Else it waits.\n";
    assert_eq!(habits_of("a.rs", rust).len(), 2);
    // Strings, characters, code in a comment, and words with the same beginning.
    let rust = "let s = r#\"// What\"#; let c = '\"'; let l: &'static str = \"/* Who */\";\n// Whole numbers, `is told`, whatever.\n";
    assert_eq!(habits_of("a.rs", rust), Vec::<String>::new());
    // The second paragraph opens badly. The heading and the item do not count as openers.
    let rust = "/// # Who waits\n///\n/// - What it is\n///\n/// What it does.\n";
    assert_eq!(habits_of("a.rs", rust).len(), 1);
    // The code of an example has comments of its own.
    let rust = "/// ```\n/// // What it does.\n/// let s = \"Else\";\n/// ```\n";
    assert_eq!(habits_of("a.rs", rust).len(), 1);
    assert_eq!(
        habits_of("a.rs", "/* Who /* nested */ waits */ let x = 1; /* Whoever */").len(),
        2
    );

    assert_eq!(
        habits_of("a.sql", "SELECT '-- What'; -- Who waits\n-- is\n-- told\n").len(),
        2
    );
    assert_eq!(
        habits_of("a.lua", "local s = \"-- Who\" -- nothing for nobody\n").len(),
        1
    );
    assert_eq!(
        habits_of("a.sh", "#!/bin/sh\necho ${#a} '# What' # Who waits\n").len(),
        1
    );
    assert_eq!(
        habits_of(
            "a.md",
            "# What it promises\n\n| Who |\n|---|\n\nWhat it does.\n\n```sh\nElse\n```\n"
        )
        .len(),
        1
    );
    assert_eq!(habits_of("a.html", "<!-- What -->"), Vec::<String>::new());
}

/// Returns every file of the repository with prose that the test can read.
fn files(root: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = entries(root).into_iter().filter(|path| path.is_file()).collect();
    for folder in FOLDERS {
        walk(&root.join(folder), &mut files);
    }
    files.retain(|file| Syntax::of(&file.to_string_lossy()).is_some() && !file.ends_with("Cargo.lock"));
    files.sort();
    files
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
    for path in entries(folder) {
        if path.is_file() {
            files.push(path);
        } else if !path.ends_with("target") {
            walk(&path, files);
        }
    }
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// Returns the forbidden habits in the comments of a file, each with its place.
fn habits_of(path: &str, source: &str) -> Vec<String> {
    let Some(syntax) = Syntax::of(path) else {
        return Vec::new();
    };
    let comments = match syntax {
        Syntax::Markdown => vec![Comment {
            line: 1,
            text: source.to_owned(),
        }],
        Syntax::Code(code) => comments_of(source, &code),
    };
    let mut habits = Vec::new();
    for paragraph in comments.iter().flat_map(paragraphs_of) {
        for habit in paragraph.habits() {
            habits.push(format!("{path}:{}: {habit}", paragraph.line));
        }
    }
    habits
}

/// The syntax of comments in a language.
struct Code {
    line: &'static str,
    /// Whether the marker of a comment must stand at the start of a line or after a space.
    is_spaced: bool,
    block: Option<(&'static str, &'static str)>,
    is_rust: bool,
}

enum Syntax {
    Markdown,
    Code(Code),
}

impl Syntax {
    fn of(path: &str) -> Option<Self> {
        let (line, is_spaced, block) = match Path::new(path).extension()?.to_str()? {
            "md" => return Some(Self::Markdown),
            "rs" | "c" => ("//", false, Some(("/*", "*/"))),
            "sql" => ("--", false, Some(("/*", "*/"))),
            "lua" => ("--", false, None),
            "sh" | "py" | "toml" | "yml" => ("#", true, None),
            _ => return None,
        };
        Some(Self::Code(Code {
            line,
            is_spaced,
            block,
            is_rust: path.ends_with(".rs"),
        }))
    }
}

struct Comment {
    line: usize,
    text: String,
}

/// Returns the comments of a source. Consecutive whole-line comments count as one.
fn comments_of(source: &str, code: &Code) -> Vec<Comment> {
    let mut comments: Vec<Comment> = Vec::new();
    // The kind of the last comment, and the line that would continue it.
    let mut continues: Option<(&str, usize)> = None;
    let (mut at, mut line, mut line_start) = (0, 1, 0);
    while at < source.len() {
        let (rest, before) = (&source[at..], &source[line_start..at]);
        let is_marked =
            rest.starts_with(code.line) && !(code.is_spaced && before.ends_with(|c: char| !c.is_whitespace()));
        let end = if is_marked {
            let end = rest.find('\n').unwrap_or(rest.len());
            let (kind, text) = split_marker(&rest[..end], code);
            let is_whole = before.trim().is_empty();
            if !rest.starts_with("#!") {
                match comments
                    .last_mut()
                    .filter(|_| is_whole && continues == Some((kind, line)))
                {
                    Some(last) => last.text.extend(["\n", text]),
                    None => comments.push(Comment {
                        line,
                        text: text.to_owned(),
                    }),
                }
            }
            continues = is_whole.then_some((kind, line + 1));
            end
        } else if let Some(length) = code.block.and_then(|block| block_length(rest, block)) {
            let inner = rest[..length].trim_matches(|c| c == '/' || c == '*' || c == '!');
            let text = inner
                .lines()
                .map(|line| line.trim_start().trim_start_matches("* "))
                .collect::<Vec<_>>();
            comments.push(Comment {
                line,
                text: text.join("\n"),
            });
            length
        } else {
            literal_length(rest, before, code)
        };
        if let Some(newline) = rest[..end].rfind('\n') {
            line += rest[..end].matches('\n').count();
            line_start = at + newline + 1;
        }
        at += end;
    }
    comments
}

/// Splits a line comment into its marker, which distinguishes doc comments from others, and its
/// text.
fn split_marker<'s>(comment: &'s str, code: &Code) -> (&'s str, &'s str) {
    let extra = comment[code.line.len()..].starts_with(['/', '!']) && code.is_rust;
    let (marker, text) = comment.split_at(code.line.len() + usize::from(extra));
    (marker, text.strip_prefix(' ').unwrap_or(text))
}

/// The length of the block comment at the start of the text. Blocks nest.
fn block_length(text: &str, (open, close): (&str, &str)) -> Option<usize> {
    let (mut at, mut depth) = (0, 0);
    while text.starts_with(open) && at < text.len() {
        let rest = &text[at..];
        if rest.starts_with(open) {
            (at, depth) = (at + open.len(), depth + 1);
        } else if rest.starts_with(close) {
            (at, depth) = (at + close.len(), depth - 1);
        } else {
            at += first_char(rest);
        }
        if depth == 0 {
            return Some(at);
        }
    }
    None
}

/// The length of the string or character at the start of the text, or of one character of code.
fn literal_length(text: &str, before: &str, code: &Code) -> usize {
    if code.is_rust {
        if let Some(length) = raw_string_length(text, before) {
            return length;
        }
        if let Some(rest) = text.strip_prefix('\'') {
            // A lifetime has no quote after its first character.
            let is_char = rest.starts_with('\\') || rest[first_char(rest)..].starts_with('\'');
            return if is_char { quoted_length(text, '\'', false) } else { 1 };
        }
        return if text.starts_with('"') {
            quoted_length(text, '"', true)
        } else {
            first_char(text)
        };
    }
    match text.chars().next() {
        Some(quote @ ('"' | '\'')) => quoted_length(text, quote, false),
        _ => first_char(text),
    }
}

fn raw_string_length(text: &str, before: &str) -> Option<usize> {
    let hashes = text.strip_prefix('r')?;
    let prefix = before.trim_end_matches(['b', 'c']);
    if prefix.ends_with(|c: char| c.is_alphanumeric() || c == '_') {
        return None;
    }
    let count = hashes.len() - hashes.trim_start_matches('#').len();
    let content = hashes[count..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(count));
    let length = content.find(&end).map_or(content.len(), |at| at + end.len());
    Some(text.len() - content.len() + length)
}

/// The length of a quoted string. In a language whose strings cannot span lines, the string ends
/// with its line, because its quote may be an apostrophe.
fn quoted_length(text: &str, quote: char, spans_lines: bool) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        if escaped {
            escaped = false;
        } else if c == '\\' {
            escaped = true;
        } else if c == quote {
            return at + 1;
        }
        if c == '\n' && !spans_lines {
            return at;
        }
    }
    text.len()
}

fn first_char(text: &str) -> usize {
    text.chars().next().map_or(0, char::len_utf8)
}

struct Paragraph {
    line: usize,
    text: String,
    /// Whether it is plain text rather than a heading, an item of a list or a row of a table.
    is_plain: bool,
}

impl Paragraph {
    fn habits(&self) -> Vec<String> {
        let text = without_code(&self.text);
        let first = text.split(|c: char| !c.is_alphabetic()).find(|word| !word.is_empty());
        let mut habits = Vec::new();
        if let Some(opener) = first.filter(|word| self.is_plain && OPENERS.contains(word)) {
            habits.push(format!("opens with \"{opener}\": {}", excerpt(&text, 0)));
        }
        for at in occurrences(&text, "Else") {
            habits.push(format!("a sentence begins with \"Else\": {}", excerpt(&text, at)));
        }
        let lower = text.to_ascii_lowercase();
        for phrase in PHRASES {
            for at in occurrences(&lower, phrase) {
                habits.push(format!("\"{phrase}\": {}", excerpt(&text, at)));
            }
        }
        habits
    }
}

/// Returns the paragraphs of a comment in Markdown. Of a code block, only the comments count.
fn paragraphs_of(comment: &Comment) -> Vec<Paragraph> {
    let mut paragraphs: Vec<Paragraph> = Vec::new();
    let mut is_open = false;
    let mut code: Option<(String, String)> = None;
    for (number, line) in (comment.line..).zip(comment.text.lines()) {
        let line = line.trim();
        if let Some(language) = line.strip_prefix("```") {
            is_open = false;
            code = match code.take() {
                None => Some((language.to_owned(), String::new())),
                Some((language, text)) => {
                    paragraphs.extend(paragraphs_of_code(&language, &text, number));
                    None
                }
            };
            continue;
        }
        if let Some((_, text)) = &mut code {
            // rustdoc hides the lines that begin with `# `.
            text.extend([line.strip_prefix("# ").unwrap_or(line), "\n"]);
            continue;
        }
        let is_item = ["- ", "* ", "+ "].iter().any(|marker| line.starts_with(marker))
            || line
                .split_once(". ")
                .is_some_and(|(number, _)| number.parse::<u8>().is_ok());
        let is_plain = !is_item && !line.starts_with(['#', '|']);
        match paragraphs
            .last_mut()
            .filter(|_| is_open && is_plain && !line.is_empty())
        {
            Some(last) => last.text.extend([" ", line]),
            None if line.is_empty() => {}
            None => paragraphs.push(Paragraph {
                line: number,
                text: line.to_owned(),
                is_plain,
            }),
        }
        is_open = !line.is_empty() && !line.starts_with(['#', '|']);
    }
    paragraphs
}

fn paragraphs_of_code(language: &str, text: &str, end: usize) -> Vec<Paragraph> {
    let name = language.split(',').next().unwrap_or_default();
    let extension = match name {
        "" | "rust" | "no_run" | "ignore" | "should_panic" | "compile_fail" => "rs",
        other => other,
    };
    let Some(Syntax::Code(code)) = Syntax::of(&format!("code.{extension}")) else {
        return Vec::new();
    };
    let start = end - text.lines().count();
    let comments = comments_of(text, &code);
    let paragraphs = comments.iter().flat_map(paragraphs_of);
    paragraphs
        .map(|paragraph| Paragraph {
            line: start + paragraph.line - 1,
            ..paragraph
        })
        .collect()
}

/// Returns the text without the parts between backticks.
fn without_code(text: &str) -> String {
    let parts = text.split('`').enumerate();
    parts
        .map(|(index, part)| if index % 2 == 0 { part } else { "`" })
        .collect()
}

/// Returns the positions at which a phrase occurs as whole words.
fn occurrences(text: &str, phrase: &str) -> Vec<usize> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '-';
    let all = text.match_indices(phrase).map(|(at, _)| at);
    all.filter(|at| !text[..*at].ends_with(is_word) && !text[at + phrase.len()..].starts_with(is_word))
        .collect()
}

fn excerpt(text: &str, at: usize) -> String {
    text[at..].chars().take(60).collect()
}
