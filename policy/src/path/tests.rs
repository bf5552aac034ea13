use super::*;
use proptest::prelude::*;

const ALL: [Normalization; 4] =
    [Normalization::None, Normalization::Base, Normalization::MergeSlashes, Normalization::DecodeAndMergeSlashes];

#[test]
fn as_envoy_does() {
    // Target; what NONE, BASE, MERGE_SLASHES and DECODE_AND_MERGE_SLASHES make of it ("=": the same as the one before).
    let cases = [
        ("/a/b", "/a/b", "=", "=", "="),
        ("/", "/", "=", "=", "="),
        ("*", "*", "=", "=", "="),
        ("/a/./b", "/a/./b", "/a/b", "=", "="),
        ("/a/../b", "/a/../b", "/b", "=", "="),
        ("/a/..", "/a/..", "/", "=", "="),
        ("/a/.", "/a/.", "/a/", "=", "="),
        ("/../../a", "/../../a", "/a", "=", "="),
        ("/a/%2e%2e/b", "/a/%2e%2e/b", "/b", "=", "="),
        ("/a/.%2E/b", "/a/.%2E/b", "/b", "=", "="),
        ("/a/%2e/b", "/a/%2e/b", "/a/b", "=", "="),
        ("/.a", "/.a", "=", "=", "="),
        ("/..a/...", "/..a/...", "=", "=", "="),
        ("/a..", "/a..", "=", "=", "="),
        ("/a/b.html", "/a/b.html", "=", "=", "="),
        ("/a\\b", "/a\\b", "/a/b", "=", "="),
        ("/a\\..\\b", "/a\\..\\b", "/b", "=", "="),
        ("\\a", "\\a", "/a", "=", "="),
        ("//a//b//", "//a//b//", "=", "/a/b/", "="),
        ("/a//../b", "/a//../b", "/a/b", "=", "="),
        ("//..//", "//..//", "//", "/", "="),
        ("/%61%5F%7e", "/%61%5F%7e", "/a_~", "=", "="),
        ("/a%2fb", "/a%2fb", "=", "=", "/a/b"),
        ("/a%2Fb%5cc", "/a%2Fb%5cc", "=", "=", "/a/b/c"),
        ("/a%2f%2fb", "/a%2f%2fb", "=", "=", "/a/b"),
        ("/a%2f..%2fb", "/a%2f..%2fb", "=", "=", "/b"),
        ("/%252e%252e/", "/%252e%252e/", "=", "=", "="),
        ("/%252f", "/%252f", "=", "=", "="),
        ("/a;x=1/../b", "/a;x=1/../b", "/b", "=", "="),
        ("/..;/a", "/..;/a", "/a", "=", "="),
        ("/a/..;x=1/b", "/a/..;x=1/b", "/b", "=", "="),
        ("/a/.;x/b", "/a/.;x/b", "/a/b", "=", "="),
        ("/a/%2e.;/b", "/a/%2e.;/b", "/b", "=", "="),
        ("/a/..;", "/a/..;", "/", "=", "="),
        ("/a/..;%2fb", "/a/..;%2fb", "/", "=", "/b"),
        ("/a/..%3b/b", "/a/..%3b/b", "=", "=", "="),
        ("/a/...;/b;..", "/a/...;/b;..", "=", "=", "="),
        ("/a?/../b//c%2f", "/a?/../b//c%2f", "=", "=", "="),
        ("/./a?x=../", "/./a?x=../", "/a?x=../", "=", "="),
        ("/a#b", "/a", "=", "=", "="),
        ("/a?b#c?d", "/a?b", "=", "=", "="),
        ("/a#/../b", "/a", "=", "=", "="),
        ("/a%20b c", "/a%20b c", "/a%20b%20c", "=", "="),
        ("/ä", "/ä", "/%C3%A4", "=", "="),
        ("/%c3%A4", "/%c3%A4", "=", "=", "="),
        ("/%zz%", "/%zz%", "=", "=", "="),
        ("/%%300", "/%%300", "/%2500", "=", "="),
        ("/%%30%30", "/%%30%30", "/%2500", "=", "="),
        ("/%3b%3a%40", "/%3b%3a%40", "=", "=", "="),
        ("", "", "/", "=", "="),
        ("?a", "?a", "/?a", "=", "="),
        ("a/b", "a/b", "/a/b", "=", "="),
    ];
    for (target, none, base, merge, decode) in cases {
        let mut expected = none;
        for (how, next) in ALL.into_iter().zip([none, base, merge, decode]) {
            expected = if next == "=" { expected } else { next };
            assert_eq!(normalise(target, how).unwrap(), expected, "{target:?} {how:?}");
        }
    }
}

#[test]
fn a_nul_is_refused() {
    for target in ["/%00", "/a%00/b", "/\0", "/a/..;%00/b", "/a/.;\0"] {
        assert_eq!(normalise(target, Normalization::Base), Err(Refused));
    }
    assert_eq!(normalise("/a?%00", Normalization::Base).unwrap(), "/a?%00");
}

#[test]
fn a_normal_path_is_borrowed() {
    for how in ALL {
        for target in ["/", "/a/b.c/d-e_f~g?x=%2f#f", "/v1.2/%20;p=1/@me", "/a%C3%A4"] {
            assert!(matches!(normalise(target, how), Ok(Cow::Borrowed(_))), "{target} {how:?}");
        }
    }
}

#[test]
fn templates() {
    let cases: [(&str, &[&str], &[&str]); 9] = [
        ("/a/{*}", &["/a/b", "/a/b.c", "/a/*"], &["/a", "/a/", "/a/b/", "/a/b/c", "/b/b"]),
        ("/a/{*}/b", &["/a/x/b"], &["/a//b", "/a/b", "/a/x/y/b", "/a/x/bb"]),
        ("/a/{**}", &["/a/", "/a/b", "/a/b/c/"], &["/a", "/ab"]),
        ("/{**}", &["/", "/a/b"], &[""]),
        ("/a/{**}/b", &["/a/x/b", "/a/x/y/b", "/a//b"], &["/a/b", "/a/x/b/"]),
        ("/{*}/{*}", &["/a/b"], &["/a", "/a/", "//b", "/a/b/c"]),
        ("/{*}/a/{**}", &["/x/a/", "/x/a/b"], &["/x/a", "/x/y/a/"]),
        ("/{*}", &["/a"], &["/", "a"]),
        ("/a", &["/a"], &["/a/", "/"]),
    ];
    for (template, good, bad) in cases {
        let compiled = Template::parse(template).unwrap();
        for path in good {
            assert!(compiled.matches(path.as_bytes()), "{template} must match {path:?}");
        }
        for path in bad {
            assert!(!compiled.matches(path.as_bytes()), "{template} must not match {path:?}");
        }
    }
    for bad in ["", "a/{*}", "{*}", "/a{*}", "/{*}b", "/{**}/{*}", "/{**}/{**}", "/{a}", "/a*", "/{*"] {
        assert!(Template::parse(bad).is_err(), "{bad:?}");
    }
}

/// Texts of what matters here more often than of anything.
fn target() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        Just("/"),
        Just("."),
        Just(".."),
        Just("%2e"),
        Just("%2E"),
        Just("\\"),
        Just("%2f"),
        Just("%5C"),
        Just("//"),
        Just("a"),
        Just("%"),
        Just("%41"),
        Just("%3"),
        Just("0"),
        Just("?"),
        Just("#"),
        Just("%25"),
        Just("ä"),
        Just(";x"),
        Just(";"),
        Just("%3b"),
    ];
    prop_oneof![prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat()), any::<String>()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn whatever_comes_the_result_is_normal(target in target()) {
        for how in ALL {
            let Ok(once) = normalise(&target, how) else { continue };
            if how == Normalization::None || once == "*" {
                continue;
            }
            let path = once.split('?').next().unwrap();
            prop_assert!(path.starts_with('/'));
            prop_assert!(!path.contains('\\'));
            prop_assert!(!path.split('/').any(|segment| matches!(segment.split(';').next(), Some("." | ".."))), "{}", path);
            if how != Normalization::Base {
                prop_assert!(!path.contains("//"), "{}", path);
            }
            // To normalise again changes nothing: no second reading by whoever does so behind the proxy.
            prop_assert_eq!(normalise(&once, how).unwrap(), once.clone(), "{}", target);
            // What is said to need nothing is what the long way makes of it.
            if let Cow::Borrowed(same) = once && how == Normalization::Base {
                prop_assert_eq!(canonical(same.split('?').next().unwrap().as_bytes()).unwrap(), path.as_bytes());
            }
        }
    }

    #[test]
    fn templates_of_any_text_are_read_or_refused(text in target(), path in target()) {
        if let Ok(template) = Template::parse(&text) {
            template.matches(path.as_bytes());
        }
    }
}
