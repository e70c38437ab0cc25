-- $1 question.
--
-- Returns whether the table and its index exist.
SELECT EXISTS (
    SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
    WHERE i.indrelid = to_regclass('{table}') AND a.attname = 'publish_at'
) AS changed, {tag} AS statement, $1::bigint AS question
