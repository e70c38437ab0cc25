//! The redirects that a service may follow, as far as its type shows.

/// The conclusion from the type of a service. A greater value means less knowledge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Follows {
    /// Every visible `FollowRedirect` obeys a `SameOriginKey`.
    Obedient,
    /// Every visible `FollowRedirect` has a `SameOriginKey`, but another policy may overrule it. The redirects are known only if
    /// that `SameOriginKey` can report them.
    Reporting,
    /// A visible `FollowRedirect` might not report its redirects.
    Silent,
}

/// The name of `SameOriginKey`, which exists only with its feature.
const SAME_ORIGIN_KEY: &str = "tower_idempotency::client::redirect::SameOriginKey";

/// Judges each `FollowRedirect` in a service, of any version of `tower-http`, by its own policy. Does not count them,
/// because a type name can contain another one several times (`Either<Limit<S>, S>`), and one `FollowRedirect` can have
/// several policies.
///
/// A box around the service hides its type, so this function is a second line of defence; the first one is
/// [`SameOriginKey`](super::SameOriginKey).
pub(super) fn follows_of<S>() -> Follows {
    in_name(std::any::type_name::<S>())
}

fn in_name(name: &str) -> Follows {
    let all = |found: &'static str, arguments| {
        let each = name.match_indices(found);
        each.map(move |(at, _)| of_one(&name[..at], &name[at + found.len()..], arguments))
    };
    let services = all("::FollowRedirect<", 2);
    // The type of a `Buffer` has the future of its service, and not the service.
    let futures = all("::follow_redirect::ResponseFuture<", 3);
    services.chain(futures).max().unwrap_or(Follows::Obedient)
}

/// Judges one `FollowRedirect`, or its future, by the text before and after its name. The policy is its last argument.
fn of_one(before: &str, after: &str, number: usize) -> Follows {
    let path = before.rsplit(|char| !is_of_path(char)).next();
    if !matches!(path, Some("tower_http" | "tower_http::follow_redirect")) {
        return Follows::Silent;
    }
    // The name omits the standard policy of a `FollowRedirect`, because that one is the default.
    let arguments = || Arguments(Some(after));
    match arguments().last() {
        Some(policy) if arguments().count() == number => of_policy(policy),
        _ => Follows::Silent,
    }
}

/// Judges a policy by its type.
fn of_policy(name: &str) -> Follows {
    if name == SAME_ORIGIN_KEY {
        return Follows::Obedient;
    }
    let Some((path, arguments)) = name.split_once('<') else {
        return Follows::Silent;
    };
    // A closure or a function can mention any type.
    if !(path.chars().all(is_of_path) && name.ends_with('>')) {
        return Follows::Silent;
    }
    let each = Arguments(Some(arguments)).map(of_policy);
    let of_all = match path {
        "tower_http::follow_redirect::policy::and::And" => return each.min().unwrap_or(Follows::Silent),
        "tower_http::follow_redirect::policy::or::Or" => each.min(),
        // It may choose one of several policies.
        _ => each.max(),
    };
    of_all.map_or(Follows::Silent, |follows| follows.max(Follows::Reporting))
}

const fn is_of_path(char: char) -> bool {
    char.is_ascii_alphanumeric() || matches!(char, '_' | ':')
}

/// The arguments of a generic type. It holds the text after the opening bracket or after a comma.
struct Arguments<'a>(Option<&'a str>);

impl<'a> Iterator for Arguments<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let text = self.0.take()?;
        let mut depth = 0_usize;
        let mut last = ' ';
        for (at, char) in text.char_indices() {
            match char {
                ',' if depth == 0 => {
                    self.0 = text.get(at + 1..);
                    return Some(text[..at].trim());
                }
                '>' if last == '-' => {}
                '>' if depth == 0 => return Some(text[..at].trim()),
                '<' | '(' | '[' | '{' => depth += 1,
                '>' | ')' | ']' | '}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            last = char;
        }
        // The text is not a list of arguments.
        None
    }
}
