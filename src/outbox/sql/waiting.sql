-- $1 question.
SELECT count(*) AS changed, {tag} AS statement, $1::bigint AS question FROM {table}
