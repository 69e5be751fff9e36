{{- define "ingle.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "ingle.selector" -}}
app.kubernetes.io/name: ingle
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "ingle.labels" -}}
{{ include "ingle.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}
